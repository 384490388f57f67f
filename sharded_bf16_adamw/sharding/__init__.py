"""How a parameter is spread over ranks. Nothing here knows the update rule."""
