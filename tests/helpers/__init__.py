"""What several tests share. Test modules do not import each other."""
