"""What we load: one file an engine. Engines are never imported; they run as subprocesses."""
