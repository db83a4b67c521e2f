//! Targets and servers for the tests.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.
#![allow(dead_code, unreachable_pub)] // Each test file uses a part of this.

use std::net::SocketAddr;
use std::sync::Arc;

use block::Disk;
use iscsi::scsi::{Identity, Unit};
use iscsi::{Admission, Portal, Server, ServerOptions, Target};
use testkit::memory_disk::MemoryDisk;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A target of these disks under `name`, for everybody.
pub fn target(name: &str, disks: &[Arc<MemoryDisk>]) -> Target {
    let unit = |(lun, disk): (usize, &Arc<MemoryDisk>)| {
        let identity = Identity { serial: format!("{name}/{lun}") };
        Arc::new(Unit::new(Arc::clone(disk) as Arc<dyn Disk>, identity))
    };
    Target {
        name: name.parse().unwrap(),
        alias: "a disk for tests".to_owned(),
        units: disks.iter().enumerate().map(unit).collect(),
        admission: Admission::default(),
    }
}

/// A server on two portals of the loopback interface, closed when it is dropped.
pub struct Serving {
    pub server: Server,
    pub portals: [SocketAddr; 2],
    _tasks: JoinSet<std::io::Result<()>>,
}

impl Serving {
    pub async fn start(targets: Vec<Target>) -> Serving {
        Serving::with(targets, Admission::default()).await
    }

    pub async fn with(targets: Vec<Target>, discovery: Admission) -> Serving {
        let mut listeners = Vec::new();
        for _ in 0..2 {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let addresses: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
        let portals = addresses.iter().zip(1..).map(|(&address, group)| Portal { address, group }).collect();
        let server = Server::new(ServerOptions { portals, discovery });
        targets.into_iter().for_each(|target| server.add(target).unwrap());
        let mut tasks = JoinSet::new();
        for (listener, group) in listeners.into_iter().zip(1..) {
            let server = server.clone();
            tasks.spawn(async move { server.serve(listener, group).await });
        }
        Serving { server, portals: [addresses[0], addresses[1]], _tasks: tasks }
    }
}
