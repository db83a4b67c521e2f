//! What can be seen of a storm from outside while it runs: counters of the network, five times a second.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::crowd::Progress;
use super::network::{Host, Network, Traffic};

/// Between two looks.
const PERIOD: Duration = Duration::from_millis(200);

/// Looks that are kept: an hour's.
const POINTS_MAX: usize = 18_000;

/// A storm at one moment.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Point {
    /// Since the beginning.
    pub(super) seconds: f64,
    /// What arrived at all nodes together since the point before, per second.
    pub(super) received_mb_per_second: f64,
    /// What the origin sent since the point before, per second.
    pub(super) origin_sent_mb_per_second: f64,
    pub(super) vms_finished: usize,
    pub(super) nodes_complete: usize,
}

/// Somebody who looks at the network until the end.
pub(super) struct Watcher {
    task: JoinHandle<Vec<Point>>,
    end: oneshot::Sender<()>,
}

impl Watcher {
    /// Looks once more, and tells what was seen.
    pub(super) async fn end(self) -> Vec<Point> {
        // The task ends only after this, or after very many looks.
        let _ = self.end.send(());
        self.task.await.expect("looking does not panic")
    }
}

/// Looks at the network from now on.
pub(super) fn watch(
    network: Arc<Network>,
    origin: Host,
    nodes: Vec<Host>,
    progress: Arc<Progress>,
) -> Watcher {
    let (end, mut ended) = oneshot::channel();
    let task = tokio::spawn(async move {
        let look = || {
            let received: u64 = nodes.iter().map(|host| network.traffic(host).received).sum();
            Traffic { sent: network.traffic(&origin).sent, received }
        };
        let mut points = Vec::new();
        let mut before = (progress.begin.elapsed(), look());
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut more = true;
        while more && points.len() < POINTS_MAX {
            more = tokio::select! {
                _ = ticks.tick() => true,
                _ = &mut ended => false,
            };
            let now = (progress.begin.elapsed(), look());
            let moved = now.1 - before.1;
            let seconds = (now.0 - before.0).as_secs_f64();
            points.push(Point {
                seconds: now.0.as_secs_f64(),
                received_mb_per_second: moved.received as f64 / 1e6 / seconds,
                origin_sent_mb_per_second: moved.sent as f64 / 1e6 / seconds,
                vms_finished: progress.finished.load(Ordering::Relaxed),
                nodes_complete: progress.completed(),
            });
            before = now;
        }
        points
    });
    Watcher { task, end }
}
