//! Ports of the loopback interface that nobody else gets, for daemons that are told where to listen.
//!
//! A port that was free a moment ago may be another program's by the time a daemon wants it, or wants it again after it
//! was killed. So a socket of ours stays bound to it and never listens. The kernel then gives this port to nobody who
//! asks for any port, neither to listen at nor to call from; but whoever asks for this very one, with `SO_REUSEADDR` as
//! all daemons here do, may listen at it. While nobody does, callers are refused.

use std::io::{ErrorKind, Result};
use std::net::SocketAddr;

use tokio::net::TcpSocket;

/// A port of one loopback address may be taken at the other; so often in a row it is not.
const TRIES_MAX: u32 = 100;

/// A port that is ours until it is dropped.
#[derive(Debug)]
pub struct Port {
    text: String,
    number: u16,
    _sockets: Vec<TcpSocket>,
}

impl Port {
    /// A port of 127.0.0.1, and of ::1 where there is one: the name `localhost` may mean either.
    pub fn reserve() -> Port {
        for _ in 0..TRIES_MAX {
            let here = bind(TcpSocket::new_v4(), "127.0.0.1:0".parse().unwrap()).unwrap();
            let address = here.local_addr().unwrap();
            let there = bind(TcpSocket::new_v6(), format!("[::1]:{}", address.port()).parse().unwrap());
            if there.as_ref().is_err_and(|error| error.kind() == ErrorKind::AddrInUse) {
                continue;
            }
            let _sockets = [Some(here), there.ok()].into_iter().flatten().collect();
            return Port { text: address.to_string(), number: address.port(), _sockets };
        }
        panic!("there is no port that is free at both loopback addresses");
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.text
    }

    /// `PORT`.
    pub fn number(&self) -> u16 {
        self.number
    }
}

fn bind(socket: Result<TcpSocket>, address: SocketAddr) -> Result<TcpSocket> {
    let socket = socket?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}
