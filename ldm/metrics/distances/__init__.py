"""How far two sets of feature vectors are apart, each number with what it is uncertain by."""
