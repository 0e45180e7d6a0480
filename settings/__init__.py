"""What a command line or a YAML file says, as typed and checked records; imports no torch."""
