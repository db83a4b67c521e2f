//! The whole NBD server with a writable disk behind it, and any client: after an honest negotiation come
//! requests of all kinds and ranges, whole or broken off, mixed with plain noise.
//!
//! Checked: the connection always comes to its end, no operation on the disk panics, and the disk can be
//! read afterwards.

#![no_main]

use std::sync::{Arc, LazyLock};

use block::{Disk, TryIo};
use fuzz::{Input, NoBase};
use nbd::{Export, Exports, Listing, ServeError, Server};
use store::{BootId, MemoryMedia, Overlay, OverlayMedia};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, split};
use tokio::runtime::{Builder, Runtime};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread().enable_time().build().expect("a runtime with a timer needs nothing")
});

/// No whole number of blocks, so that the last one is a part.
const DISK_BYTES: u64 = 3 * 65_536 + 513;

/// How much the client may be ahead of the server, so that both wait for each other now and then.
const PIPE_BYTES: usize = 4096;

const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED: u32 = 8;
const OPTION_META_CONTEXT: u32 = 10;
const OPTION_EXTENDED: u32 = 11;

fn option(out: &mut Vec<u8>, number: u32, data: &[u8]) {
    out.extend(b"IHAVEOPT");
    out.extend(number.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}

/// Negotiates a framing and opens the disk.
fn negotiation(framing: Option<u32>) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 3];
    if let Some(framing) = framing {
        option(&mut out, framing, &[]);
        let context = [&[0; 4][..], &1u32.to_be_bytes(), &15u32.to_be_bytes(), b"base:allocation"].concat();
        option(&mut out, OPTION_META_CONTEXT, &context);
    }
    option(&mut out, OPTION_GO, &[0; 6]);
    out
}

fn request(out: &mut Vec<u8>, extended: bool, input: &mut Input<'_>) {
    let command = u16::from(input.u8()) % 9;
    let (any_offset, any_len) = (input.u64(), input.u16());
    let offset = input.pick(&[0, 4096, 65_535, DISK_BYTES - 1, DISK_BYTES, any_offset]);
    let len = input.pick(&[u64::from(any_len), 1, 4096, DISK_BYTES, 0, u32::MAX.into(), u64::MAX]);
    let payload_len = if command == 1 { len.min(u64::from(any_len)) } else { 0 };
    let len = if command == 1 { payload_len } else { len };
    out.extend(if extended { 0x21e4_1c71u32 } else { 0x2560_9513 }.to_be_bytes());
    out.extend((u16::from(input.u8()) | u16::from(extended && command == 1) << 5).to_be_bytes());
    out.extend(command.to_be_bytes());
    out.extend(input.u64().to_be_bytes());
    out.extend(offset.to_be_bytes());
    if extended {
        out.extend(len.to_be_bytes());
    } else {
        out.extend((len as u32).to_be_bytes());
    }
    out.resize(out.len() + payload_len as usize, 9);
}

fn client(input: &mut Input<'_>) -> Vec<u8> {
    let framing = input.pick(&[Some(OPTION_STRUCTURED), Some(OPTION_EXTENDED), None]);
    let mut out = negotiation(framing);
    while !input.is_empty() {
        if input.u8() == 255 {
            out.extend(input.bytes(32));
        } else {
            request(&mut out, framing == Some(OPTION_EXTENDED), input);
        }
    }
    out
}

struct OneDisk(Arc<Overlay>);

impl Exports for OneDisk {
    fn open(&self, _: &str) -> Option<Export> {
        Some(Export::new(self.0.clone()))
    }

    fn list(&self) -> Vec<Listing> {
        Vec::new()
    }
}

async fn serve(disk: &Arc<Overlay>, script: &[u8]) {
    let (ours, theirs) = duplex(PIPE_BYTES);
    let (mut replies, mut requests) = split(ours);
    let server = Server::new(Arc::new(OneDisk(disk.clone())));
    let speak = async {
        // A server that has heard enough closes the pipe.
        let _ = requests.write_all(script).await;
        let _ = requests.shutdown().await;
    };
    let listen = async {
        let mut reply = [0; PIPE_BYTES];
        while replies.read(&mut reply).await.is_ok_and(|len| len > 0) {}
    };
    let (served, (), ()) = tokio::join!(server.serve(theirs, std::future::pending()), speak, listen);
    assert!(!matches!(served, Err(ServeError::Disk(_) | ServeError::NotDrained)), "{served:?}");
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let script = client(&mut Input::new(bytes));
    let memory = || Arc::new(MemoryMedia::new(0));
    let media = OverlayMedia { data: memory(), map: memory(), live: memory(), boot: BootId([0; 16]) };
    let disk = Overlay::create_on(media, DISK_BYTES, Arc::new(NoBase)).expect("memory takes all");
    let disk = Arc::new(disk);
    RUNTIME.block_on(serve(&disk, &script));
    let mut all = vec![0; DISK_BYTES as usize];
    assert_eq!(disk.try_read(0, &mut all).expect("the disk is intact"), TryIo::Done);
});
