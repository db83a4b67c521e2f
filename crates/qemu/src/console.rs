//! Attaches a terminal to a VM's serial console.
//!
//! On a terminal, keys go to the guest one by one, and `Ctrl-]` ends the attachment. Anything else on standard
//! input, a pipe or a file, is copied as it is, so that a script can talk to a guest; its end leaves the
//! console attached until the guest's side closes. A console has one client at a time; the next one is served
//! when the first has left.
//!
//! The terminal gets its settings back on every way out, by `Drop`, but not after SIGKILL.

use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// The key that ends the attachment: Ctrl-].
const ESCAPE_KEY: u8 = 0x1d;

/// Bytes copied at a time.
const COPY_BYTES: usize = 4096;

/// How an attachment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detached {
    /// The user pressed the escape key.
    ByUser,
    /// The console closed: the VM has ended.
    ByVm,
}

/// What the bytes of the user's side mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Input {
    /// Keys of a terminal, among which is the escape key.
    Keys,
    /// Bytes of any meaning.
    Bytes,
}

/// Attaches standard input and output to the console at `socket` until one side ends it.
///
/// The blocking read of standard input outlives this call: a program that does more afterwards must end
/// with `std::process::exit` or read no input.
pub async fn attach(socket: &Path) -> io::Result<Detached> {
    let console = UnixStream::connect(socket).await?;
    let input = if io::stdin().is_terminal() { Input::Keys } else { Input::Bytes };
    let _raw = match input {
        Input::Keys => Some(RawTerminal::enter()?),
        Input::Bytes => None,
    };
    copy(console, input, tokio::io::stdin(), tokio::io::stdout()).await
}

async fn copy(
    console: UnixStream,
    input: Input,
    mut from_user: impl AsyncRead + Unpin,
    mut to_user: impl AsyncWrite + Unpin,
) -> io::Result<Detached> {
    let (mut from_guest, mut to_guest) = console.into_split();
    let upward = async {
        let mut bytes = [0; COPY_BYTES];
        loop {
            let read = from_user.read(&mut bytes).await?;
            if read == 0 {
                // A script has said all that it wants to; what the guest answers still matters.
                return std::future::pending().await;
            }
            let keys = &bytes[..read];
            let escape = keys.iter().position(|&key| input == Input::Keys && key == ESCAPE_KEY);
            to_guest.write_all(&keys[..escape.unwrap_or(read)]).await?;
            if escape.is_some() {
                return Ok(Detached::ByUser);
            }
        }
    };
    let downward = async {
        let mut bytes = [0; COPY_BYTES];
        loop {
            let read = from_guest.read(&mut bytes).await?;
            if read == 0 {
                return Ok(Detached::ByVm);
            }
            to_user.write_all(&bytes[..read]).await?;
            to_user.flush().await?;
        }
    };
    tokio::select! {
        ended = upward => ended,
        ended = downward => ended,
    }
}

/// The terminal in raw mode, for as long as this lives.
struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    fn enter() -> io::Result<RawTerminal> {
        RawTerminal::of(rustix::io::dup(io::stdin())?)
    }

    fn of(terminal: OwnedFd) -> io::Result<RawTerminal> {
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(RawTerminal { terminal, before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that has gone needs no restoring.
        let _ = tcsetattr(&self.terminal, OptionalActions::Flush, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs an attachment against a guest that prints `prints`, hears `hears` bytes and then hangs up.
    /// Gives what the guest heard, what the user saw and how it ended.
    async fn talk(input: Input, says: &[u8], prints: &[u8], hears: usize) -> (Vec<u8>, Vec<u8>, Detached) {
        let (client, mut guest) = UnixStream::pair().unwrap();
        let prints = prints.to_owned();
        let guest = tokio::spawn(async move {
            guest.write_all(&prints).await.unwrap();
            let mut heard = vec![0; hears];
            guest.read_exact(&mut heard).await.unwrap();
            heard
        });
        let mut seen = Vec::new();
        let ended = copy(client, input, says, &mut seen).await.unwrap();
        (guest.await.unwrap(), seen, ended)
    }

    #[tokio::test]
    async fn the_escape_key_ends_an_attachment_after_what_was_typed_before_it() {
        let (heard, _, ended) = talk(Input::Keys, b"root\n\x1dnot this", b"", 5).await;
        assert_eq!((heard.as_slice(), ended), (b"root\n".as_slice(), Detached::ByUser));
    }

    #[tokio::test]
    async fn a_script_may_say_every_byte_and_sees_the_answer_after_its_end() {
        let (heard, seen, ended) = talk(Input::Bytes, b"a\x1db", b"login: ", 3).await;
        assert_eq!((heard.as_slice(), seen.as_slice()), (b"a\x1db".as_slice(), b"login: ".as_slice()));
        assert_eq!(ended, Detached::ByVm);
    }

    #[test]
    fn a_terminal_gets_its_settings_back() {
        // A new pseudo-terminal at each opening.
        let terminal =
            OwnedFd::from(std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap());
        let modes = || tcgetattr(&terminal).unwrap().local_modes;
        let before = modes();
        let raw = RawTerminal::of(rustix::io::dup(&terminal).unwrap()).unwrap();
        assert_ne!(modes(), before, "raw mode changes the settings");
        drop(raw);
        assert_eq!(modes(), before);
    }
}
