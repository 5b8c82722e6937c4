"""What users run and call around a merge: commands, check, report, search, AdaMerging, demo."""
