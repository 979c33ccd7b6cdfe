"""What encrypts connections and says who is at their ends, for router, gateway and worker alike.

It imports nothing of them.
"""
