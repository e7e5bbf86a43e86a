"""What `main.py` needs to train safely: flags, estimators, a run's folder, its pictures, several processes."""
