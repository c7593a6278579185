"""What passes cost: tables and their files, lookup in them, and their correction while serving."""
