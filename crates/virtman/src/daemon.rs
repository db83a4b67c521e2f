//! What both daemons share: telling the service manager that they are ready, and stopping when told to.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Tells systemd, if it started us, that requests are served from now on.
pub(crate) fn ready() {
    // Without systemd there is nobody to tell, and that is no failure.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

/// Cancels `shutdown` at the first SIGTERM or SIGINT.
pub(crate) async fn stop_on_signal(shutdown: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::warn!("signals cannot be caught; the daemon ends only by being killed, which is safe");
        return shutdown.cancelled().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    shutdown.cancel();
}
