//! What both daemons share: room for open files, where they listen, telling the service manager that they are ready, and
//! stopping when told to.

use std::net::SocketAddr;
use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::http::{UnixServer, bind_unix};

/// Raises the number of files that this process may open to what the system allows it. Each layer of a VM's disk takes
/// three, so a VM without snapshots four with its socket, and each connection one; the usual soft limit of 1,024 exists
/// for programs that use `select`.
pub fn open_many_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, ?limit, "open_files_limited: and with them the number of VMs");
    }
}

/// Tells systemd, if it started us, that requests are served from now on.
pub fn ready() {
    // Without systemd there is nobody to tell, and that is not a failure.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

/// Cancels `shutdown` at the first SIGTERM or SIGINT.
pub async fn stop_on_signal(shutdown: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::warn!("signals_not_caught: the daemon ends only by being killed, which is safe");
        return shutdown.cancelled().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("daemon_stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    shutdown.cancel();
}

/// Listens on TCP; the error says what to do.
pub async fn listen(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|e| {
        format!("cannot listen on {address}: {e}; stop what listens there, or choose another address with --listen")
    })
}

/// Listens on the API's UNIX socket.
pub fn local_socket(path: &Path) -> Result<UnixServer, String> {
    bind_unix(path).map_err(|e| format!("cannot open the local socket: {e}"))
}
