"""Frames in the memory of several memcached servers: connections, which server, reading through, what it saved."""
