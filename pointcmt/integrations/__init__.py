"""PointCMT inside other training frameworks; each file needs its framework installed."""
