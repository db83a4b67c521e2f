//! When a guest counts as ready, and waiting for it.
//!
//! - `console:REGEX`: the regular expression matches what the console printed since the start, without escape
//!   sequences, with `^` and `$` at line ends. The log file is followed by inotify.
//! - `agent`: the guest agent answers a ping.
//! - `tcp:PORT`: the guest accepts connections on its TCP port PORT. QEMU accepts the host's connection
//!   before the guest has answered, so what counts is QEMU's own word that the guest's half stands.
//!
//! A wait ends early when the VM's process ends. It may be cancelled and begun again at any time.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use regex::{Regex, RegexBuilder};
use rustix::fs::inotify;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::process::wait_readable;
use super::qemu::user_network;
use super::{Qemu, VmError};

/// Bytes of console text that a match may span. More than a screen, and little enough to search again each
/// time that the guest printed something.
const CONSOLE_WINDOW_BYTES: usize = 16 * 1024;

/// Bytes of console log read at a time.
const CONSOLE_READ_BYTES: usize = 8 * 1024;

/// How often QEMU is asked about one connection before the next is tried: a second in all, because QEMU
/// repeats an unanswered request for a connection ever more rarely.
const TCP_LOOKS: usize = 10;

/// How often QEMU is asked how far a connection came, and how long after a refusal the next is tried. Nothing
/// announces either, and asking costs QEMU less than a millisecond.
const TCP_INTERVAL: Duration = Duration::from_millis(100);

/// When a guest counts as ready.
#[derive(Debug, Clone)]
pub enum Ready {
    /// Its console printed something that matches.
    Console(Regex),
    /// Its guest agent answers.
    Agent,
    /// It accepts connections on this TCP port.
    Tcp(u16),
}

/// Why a guest is not ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// The time was up; the VM runs on.
    #[error("the guest was not ready ({0}) in time")]
    Late(Ready),
    /// The VM's process ended before.
    #[error("the VM ended before the guest was ready")]
    Ended,
    /// The port is not among those that the VM's network forwards.
    #[error("the VM's network does not forward the guest's port {0}")]
    NotForwarded(u16),
    /// The VM cannot be watched.
    #[error(transparent)]
    Vm(#[from] VmError),
}

impl FromStr for Ready {
    type Err = String;
    fn from_str(text: &str) -> Result<Ready, String> {
        match text.split_once(':') {
            None if text == "agent" => Ok(Ready::Agent),
            Some(("console", pattern)) => match RegexBuilder::new(pattern).multi_line(true).build() {
                Ok(regex) if regex.is_match("") => {
                    Err(format!("'{pattern}' matches a console that printed nothing"))
                }
                Ok(regex) => Ok(Ready::Console(regex)),
                Err(error) => Err(format!("'{pattern}' is not a regular expression: {error}")),
            },
            Some(("tcp", port)) => match port.parse() {
                Ok(port) if port > 0 => Ok(Ready::Tcp(port)),
                _ => Err(format!("'{port}' is not a TCP port: use 1 to 65535")),
            },
            _ => Err(format!("'{text}' is not a sign of readiness: use console:REGEX, agent or tcp:PORT")),
        }
    }
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ready::Console(regex) => write!(f, "console:{regex}"),
            Ready::Agent => f.write_str("agent"),
            Ready::Tcp(port) => write!(f, "tcp:{port}"),
        }
    }
}

impl Ready {
    /// Waits until the guest of `vm` is ready, for at most `timeout`. Gives the time since the VM's start.
    pub async fn wait(&self, vm: &Qemu, timeout: Duration) -> Result<Duration, ReadyError> {
        let ready = async {
            match self {
                Ready::Console(regex) => console_matches(vm, regex).await,
                Ready::Agent => Ok(vm.agent().answers().await?),
                Ready::Tcp(port) => port_accepts(vm, *port).await,
            }
        };
        tokio::select! {
            // A guest that printed its last word and ended was ready.
            biased;
            outcome = ready => outcome?,
            ended = vm.exited() => return Err(ended.map_or_else(ReadyError::Vm, |()| ReadyError::Ended)),
            () = tokio::time::sleep(timeout) => return Err(ReadyError::Late(self.clone())),
        }
        Ok(SystemTime::now().duration_since(vm.started()).unwrap_or_default())
    }
}

async fn console_matches(vm: &Qemu, regex: &Regex) -> Result<(), ReadyError> {
    let path = vm.files.console_log();
    Ok(file_matches(&path, regex).await.map_err(VmError::file(path))?)
}

/// Returns once the text of a growing file, without escape sequences, matches.
async fn file_matches(path: &Path, regex: &Regex) -> io::Result<()> {
    // The watch is older than the first read, so that nothing is missed between the two.
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watch, path, inotify::WatchFlags::MODIFY)?;
    let mut file = tokio::fs::File::open(path).await?;
    let mut screen = Screen::default();
    let mut bytes = vec![0; CONSOLE_READ_BYTES];
    loop {
        match file.read(&mut bytes).await? {
            0 => {
                wait_readable(watch.try_clone()?).await?;
                // Which changes there were does not matter: the file is read to its end in any case.
                while rustix::io::read(&watch, &mut bytes).is_ok_and(|read| read > 0) {}
            }
            read => {
                screen.print(&bytes[..read]);
                if regex.is_match(&screen.text) {
                    return Ok(());
                }
            }
        }
    }
}

/// What a console printed: its last [`CONSOLE_WINDOW_BYTES`] of text, without escape sequences (ECMA-48 §5.4
/// and §5.6) and other control characters than the line feed.
#[derive(Default)]
struct Screen {
    text: String,
    state: Escape,
    /// The bytes of a UTF-8 sequence that has not ended yet.
    partial: Vec<u8>,
}

/// How far into an escape sequence the last byte was.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Escape {
    #[default]
    Outside,
    /// After ESC, or after ESC and intermediate bytes.
    Begun,
    /// In a control sequence, which a byte from `@` to `~` ends.
    Control,
    /// In a command string, which BEL or ESC `\` ends.
    Text,
    /// In a command string after an ESC.
    TextEnding,
}

impl Screen {
    fn print(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.state = match (self.state, byte) {
                (Escape::Text, 0x1b) => Escape::TextEnding,
                (_, 0x1b) => Escape::Begun,
                (Escape::Outside, _) => {
                    if byte == b'\n' || byte >= b' ' && byte != 0x7f {
                        self.partial.push(byte);
                    }
                    Escape::Outside
                }
                (Escape::Begun, b'[') => Escape::Control,
                (Escape::Begun, b']' | b'P' | b'X' | b'^' | b'_') => Escape::Text,
                (Escape::Begun, b' '..=b'/') => Escape::Begun,
                (Escape::Begun | Escape::TextEnding, _) => Escape::Outside,
                (Escape::Control, b'@'..=b'~') => Escape::Outside,
                (Escape::Text, 0x07) => Escape::Outside,
                (state, _) => state,
            };
        }
        self.take_text();
    }

    fn take_text(&mut self) {
        let end = match std::str::from_utf8(&self.partial) {
            // An unfinished character waits for its rest; a wrong one is replaced.
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            _ => self.partial.len(),
        };
        self.text.push_str(&String::from_utf8_lossy(&self.partial[..end]));
        self.partial.drain(..end);
        if self.text.len() > CONSOLE_WINDOW_BYTES {
            let cut = self.text.ceil_char_boundary(self.text.len() - CONSOLE_WINDOW_BYTES);
            self.text.drain(..cut);
        }
    }
}

async fn port_accepts(vm: &Qemu, port: u16) -> Result<(), ReadyError> {
    let forwarded = vm.forwarded_port(port).await?.ok_or(ReadyError::NotForwarded(port))?;
    loop {
        // QEMU's own port refuses only when QEMU has gone, which the caller sees by itself.
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", forwarded)).await
            && guest_accepts(vm, &stream, port).await?
        {
            return Ok(());
        }
        tokio::time::sleep(TCP_INTERVAL).await;
    }
}

/// Whether the guest accepted this connection to its `port`, before it refused or [`TCP_LOOKS`] were over.
async fn guest_accepts(vm: &Qemu, stream: &TcpStream, port: u16) -> Result<bool, ReadyError> {
    for _ in 0..TCP_LOOKS {
        let mut byte = [0];
        if let Ok(peeked) = tokio::time::timeout(TCP_INTERVAL, stream.peek(&mut byte)).await {
            // A byte is the guest's greeting; an end or an error is its refusal.
            return Ok(peeked.is_ok_and(|bytes| bytes > 0));
        }
        let table = user_network(vm).await?;
        if table.iter().any(|flow| flow.to_port == port && flow.state == "ESTABLISHED") {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn printed(pieces: &[&[u8]]) -> String {
        let mut screen = Screen::default();
        for piece in pieces {
            screen.print(piece);
        }
        screen.text
    }

    #[test]
    fn a_sign_of_readiness_is_read_and_a_wrong_one_is_refused() {
        for text in ["console:login:", "console:^vm-[0-9]+ login: $", "agent", "tcp:22"] {
            assert_eq!(text.parse::<Ready>().unwrap().to_string(), text);
        }
        for text in
            ["", "console", "console:", "console:x*", "console:(", "agent:1", "tcp:", "tcp:0", "tcp:65536"]
        {
            assert!(text.parse::<Ready>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn escape_sequences_are_no_text_wherever_a_read_ends() {
        let raw =
            b"\x1b[2J\x1b[01;32mvm-1\x1b[0m l\x1b(Bog\x1b]0;title\x07in\x1bP1;2x\x1b\\:\r\n\xc3\xa4\x07\xff!";
        let text = "vm-1 login:\n\u{e4}\u{fffd}!";
        assert_eq!(printed(&[raw]), text);
        for cut in 0..raw.len() {
            assert_eq!(printed(&[&raw[..cut], &raw[cut..]]), text, "cut at {cut}");
        }
    }

    #[test]
    fn a_console_that_prints_without_end_keeps_only_its_last_text() {
        let mut screen = Screen::default();
        for _ in 0..10 {
            screen.print("\u{e4}".repeat(CONSOLE_WINDOW_BYTES / 2).as_bytes());
        }
        screen.print(b"login:");
        assert!(screen.text.len() <= CONSOLE_WINDOW_BYTES);
        assert!(screen.text.ends_with("\u{e4}login:"));
    }

    #[tokio::test]
    async fn a_match_is_found_across_writes_to_the_console_log() {
        let mut log = tempfile::NamedTempFile::new().unwrap();
        let path = log.path().to_owned();
        log.write_all(b"booting\nvm-1 lo").unwrap();
        let regex = Regex::new("vm-1 login:").unwrap();
        let waiting = tokio::spawn(async move { file_matches(&path, &regex).await });
        tokio::task::yield_now().await;
        for byte in b"\x1b[0mgin:" {
            log.write_all(&[*byte]).unwrap();
            tokio::task::yield_now().await;
        }
        waiting.await.unwrap().unwrap();
    }
}
