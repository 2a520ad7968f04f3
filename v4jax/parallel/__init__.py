"""The mesh of devices, the rules that split arrays over it, what travels on it, and how processes meet."""
