"""The command line: parses, calls the floors below, prints. No behaviour lives here."""
