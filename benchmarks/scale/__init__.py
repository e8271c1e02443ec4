"""What the benchmarks of the control plane and the soak are made of: a namespace, a real etcd, leases, a daemon, figures."""
