"""How a prepared run is trained, whatever its kind of task."""
