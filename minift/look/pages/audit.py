def audit_page(*a): return ""
