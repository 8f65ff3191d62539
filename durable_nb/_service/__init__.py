"""What goes on without a notebook: a worker for a module's workflows."""
