//! Joining the cluster and renewing certificates, over HTTP.
