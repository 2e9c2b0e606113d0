"""Keep frames in the memory of several memcached servers: connections, routes, reading through, counters."""
