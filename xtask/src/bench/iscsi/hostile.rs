//! Initiators that hold as much of a target as they can.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use iscsi::pdu::{
    self, Digests, HEADER_BYTES, Header, Isid, LoginRequest, LoginResponse, ScsiCommand, command, stage,
};

use super::Outcome;

/// What [`Hostiles`] do, for people.
pub(super) const WHAT: &str = "120 sessions that read nothing of 100 reads of 1 MiB, and 120 that never send 100 writes of 1 MiB but for \
     64 KiB each";

const SESSIONS: u16 = 240;
const COMMANDS: u32 = 100;
const UNSOLICITED_BYTES: usize = 64 << 10;

/// How long one of them waits for the target, or for room in its socket.
const TIME_MAX: Duration = Duration::from_secs(5);

/// Sessions that stay as they are until they are dropped.
pub(super) struct Hostiles {
    _streams: Vec<TcpStream>,
}

impl Hostiles {
    pub(super) fn connect(address: SocketAddr, target: &str) -> Outcome<Hostiles> {
        let session = |n| session(address, target, n).map_err(|e| format!("a hostile session: {e}"));
        Ok(Hostiles { _streams: (0..SESSIONS).map(session).collect::<Outcome<_>>()? })
    }
}

fn session(address: SocketAddr, target: &str, n: u16) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIME_MAX))?;
    let [high, low] = n.to_be_bytes();
    let flags = stage::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE;
    let isid = Isid([0x40, 0, 0, 1, high, low]);
    let login = LoginRequest { flags, isid, cmd_sn: 1, ..LoginRequest::default() };
    let text = format!("InitiatorName=iqn.2026-11.bench:hostile-{n}\0TargetName={target}\0");
    stream.write_all(&sealed(login.header().immediate(), text.as_bytes()))?;
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header)?;
    if LoginResponse::parse(&Header(header)).status != 0 {
        return Err(std::io::Error::other("the login was refused"));
    }
    // From here on nothing is read, and no more is written than the target takes by itself.
    stream.set_nonblocking(true)?;
    let (opcode, flags, data) = if n.is_multiple_of(2) {
        (0x28, command::READ, 0)
    } else {
        (0x2a, command::WRITE, UNSOLICITED_BYTES)
    };
    let data = vec![0; data];
    for task_tag in 0..COMMANDS {
        let mut cdb = [0; 16];
        (cdb[0], cdb[7]) = (opcode, 8);
        let (flags, cmd_sn) = (flags | pdu::FINAL, 1 + task_tag);
        let pdu =
            ScsiCommand { flags, task_tag, expected_bytes: 1 << 20, cmd_sn, cdb, ..ScsiCommand::default() };
        let bytes = sealed(pdu.header(), &data);
        if !matches!(stream.write(&bytes), Ok(len) if len == bytes.len()) {
            break;
        }
    }
    Ok(stream)
}

fn sealed(header: Header, data: &[u8]) -> Vec<u8> {
    let seal = pdu::seal(header, data, Digests::default());
    [seal.head(), data, seal.tail()].concat()
}

/// Connections that come one after the other as fast as they can, each with a header that announces 16 MiB.
pub(super) struct Flood {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    pub(super) fn begin(address: SocketAddr) -> Flood {
        let ends = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ends);
        let thread = std::thread::spawn(move || {
            let mut huge = LoginRequest::default().header();
            huge.set_data_bytes((1 << 24) - 1);
            while !seen.load(Ordering::Relaxed) {
                // What fails here is what the target refuses, as it should.
                if let Ok(mut stream) = TcpStream::connect(address) {
                    let _ = stream.write_all(&huge.0);
                    let _ = stream.shutdown(Shutdown::Both);
                }
            }
        });
        Flood { ends, thread: Some(thread) }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let thread = self.thread.take();
        thread.map(JoinHandle::join);
    }
}
