"""Preference data: read (`table`), understood (`layouts`), written (`writing`), filtered by a score (`filtering`)."""
