def equal_bytes(folders, is_best):
    return ""
