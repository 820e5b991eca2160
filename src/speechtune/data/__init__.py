"""Any supported data layout in, validated samples out; every issue is reported with its file and line."""
