"""HTTP in: one file per area, thin: parse, call the core, return."""
