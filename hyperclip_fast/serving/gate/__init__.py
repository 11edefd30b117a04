"""What stands before the routes: connections, hosts and origins, keys, bodies and places."""
