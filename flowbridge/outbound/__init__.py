"""HTTP to addresses that callers name, which may be anybody's: checked, bounded in time and size, never private."""
