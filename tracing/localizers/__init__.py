"""The axis "localizer": every way to say where facts are stored, behind one face."""
