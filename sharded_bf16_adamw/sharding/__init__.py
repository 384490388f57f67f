"""The sharding of parameters over ranks, independent of the update rule."""
