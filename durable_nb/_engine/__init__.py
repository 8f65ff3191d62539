"""The embedded engine: executes the runs of cells and workflows on this machine, and keeps them in a store."""

from durable_nb._engine.engine import Asked as Asked
from durable_nb._engine.engine import Engine as Engine
from durable_nb._engine.ownership import WATCH_S as WATCH_S
