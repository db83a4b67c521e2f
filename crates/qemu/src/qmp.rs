//! A client of QEMU's control protocol (QMP).
//!
//! QEMU serves one client at a time at each socket; a second waits in the socket's backlog until the first has
//! left. So a connection to the socket for commands is held for milliseconds only, and who stays to listen for
//! events has a socket of its own.
//!
//! - *Events:* those that arrive before an answer are kept, up to a bound; of more, the oldest are forgotten. An
//!   event is a reason to ask QEMU for its state, and never the only source of it.
//! - *Cancellation:* waiting for an event may be cancelled and begun again. A connection of which a command was
//!   cancelled, or got no answer, is out of step and has to be dropped, which QEMU takes as the client's leaving.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Take};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::settle::{RefusalClass, Settling};
use super::{VmError, printable};

/// How long QEMU may take for the greeting or an answer. Its main loop answers within milliseconds; it is
/// silent for longer only while it is stuck in I/O.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Most bytes of one answer; the longest that we ask for is a few KiB.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Events that come while waiting for one answer; more than this is not QEMU.
const EVENTS_MAX: usize = 1000;

/// Events kept for who asks for them later. Who waits for one of few kinds meets it among fewer.
const EVENTS_KEPT_MAX: usize = 100;

/// A connection that has been through the greeting.
pub(crate) struct Qmp {
    lines: BufReader<Take<OwnedReadHalf>>,
    writer: OwnedWriteHalf,
    /// How long QEMU may take for an answer.
    patience: Duration,
    /// What came of the line that is being read, so that a cancelled read loses nothing.
    partial: Vec<u8>,
    /// The names of the events that came and were not asked for yet.
    events: VecDeque<String>,
}

impl Qmp {
    /// Connects to the control socket at `path`.
    pub(crate) async fn connect(path: &Path) -> Result<Qmp, VmError> {
        Qmp::connect_patiently(path, ANSWER_TIMEOUT).await
    }

    /// The same for who does what keeps QEMU from answering for longer.
    pub(crate) async fn connect_patiently(path: &Path, patience: Duration) -> Result<Qmp, VmError> {
        let stream = match UnixStream::connect(path).await {
            Ok(stream) => stream,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                return Err(VmError::Gone);
            }
            Err(error) => return Err(VmError::file(path)(error)),
        };
        let (reader, writer) = stream.into_split();
        let lines = BufReader::new(reader.take(ANSWER_BYTES_MAX));
        let mut qmp = Qmp { lines, writer, patience, partial: Vec::new(), events: VecDeque::new() };
        let greeting = qmp.line_in_time().await?;
        if greeting.get("QMP").is_none() {
            return Err(VmError::Control("it did not greet as QEMU does".to_owned()));
        }
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs one command and gives what it returned.
    pub(crate) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, VmError> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        self.writer.write_all(request.as_bytes()).await.map_err(|_| VmError::Gone)?;
        for _ in 0..EVENTS_MAX {
            let mut answer = self.line_in_time().await?;
            self.keep_event(&answer);
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let text = |key| error.get(key).and_then(Value::as_str);
                return Err(VmError::CommandRefused {
                    command: command.to_owned(),
                    class: RefusalClass::of(text("class")),
                    reason: printable(text("desc").unwrap_or("no reason given")),
                });
            }
        }
        Err(VmError::Control(format!("{command} got no answer among {EVENTS_MAX} events")))
    }

    /// The same for a command that may come too early: given again while QEMU refuses it for a moment.
    pub(crate) async fn execute_when_settled(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, VmError> {
        let mut settling = Settling::begin();
        loop {
            match self.execute(command, arguments.clone()).await {
                Err(error) => settling.wait_after(error).await?,
                done => return done,
            }
        }
    }

    /// Waits until QEMU says that something of this name happened; it may have been since the connection began.
    pub(crate) async fn happened(&mut self, name: &str) -> Result<(), VmError> {
        loop {
            while let Some(event) = self.events.pop_front() {
                if event == name {
                    return Ok(());
                }
            }
            let line = self.line().await?;
            self.keep_event(&line);
        }
    }

    fn keep_event(&mut self, line: &Value) {
        if let Some(name) = line.get("event").and_then(Value::as_str) {
            if self.events.len() == EVENTS_KEPT_MAX {
                self.events.pop_front();
            }
            self.events.push_back(name.to_owned());
        }
    }

    async fn line_in_time(&mut self) -> Result<Value, VmError> {
        let patience = self.patience;
        match tokio::time::timeout(patience, self.line()).await {
            Ok(line) => line,
            Err(_) => Err(VmError::Control(format!("no answer within {} s", patience.as_secs()))),
        }
    }

    async fn line(&mut self) -> Result<Value, VmError> {
        let already = u64::try_from(self.partial.len()).unwrap_or(u64::MAX);
        self.lines.get_mut().set_limit(ANSWER_BYTES_MAX.saturating_sub(already));
        match self.lines.read_until(b'\n', &mut self.partial).await {
            Ok(read) if read > 0 => {}
            _ => return Err(VmError::Gone),
        }
        serde_json::from_slice(&std::mem::take(&mut self.partial))
            .map_err(|error| VmError::Control(format!("its answer is not JSON: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;

    /// Serves one client: writes the greeting, and after each line that it gets, the next of `answers`.
    fn serve(path: &Path, greeting: &str, answers: &'static [&str]) -> tokio::task::JoinHandle<()> {
        let listener = UnixListener::bind(path).unwrap();
        let greeting = greeting.to_owned();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (reader, mut writer) = stream.into_split();
            let mut lines = BufReader::new(reader).lines();
            writer.write_all(format!("{greeting}\n").as_bytes()).await.unwrap();
            for answer in answers {
                let Ok(Some(_)) = lines.next_line().await else { return };
                writer.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
            }
        })
    }

    #[tokio::test]
    async fn events_before_an_answer_are_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let answers =
            &[r#"{"return": {}}"#, "{\"event\": \"RESUME\"}\n{\"return\": {\"status\": \"running\"}}"];
        let server = serve(&path, GREETING, answers);
        let mut qmp = Qmp::connect(&path).await.unwrap();
        assert_eq!(qmp.execute("query-status", json!({})).await.unwrap()["status"], "running");
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_refused_command_tells_the_reason_that_qemu_gave() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let server = serve(
            &path,
            GREETING,
            &[r#"{"return": {}}"#, r#"{"error": {"class": "X", "desc": "no such thing"}}"#],
        );
        let mut qmp = Qmp::connect(&path).await.unwrap();
        let error = qmp.execute("eject", json!({})).await.unwrap_err();
        assert!(error.to_string().contains("QEMU refused eject: no such thing"), "{error}");
        server.await.unwrap();
    }

    #[tokio::test]
    async fn nonsense_on_the_socket_is_an_error_and_no_socket_means_gone() {
        let dir = tempfile::tempdir().unwrap();
        for (name, greeting) in [("a", "hello"), ("b", "{}"), ("c", "\u{0}")] {
            let path = dir.path().join(name);
            let server = serve(&path, greeting, &[]);
            assert!(matches!(Qmp::connect(&path).await, Err(VmError::Control(_))), "{greeting:?}");
            server.await.unwrap();
        }
        assert!(matches!(Qmp::connect(&dir.path().join("none")).await, Err(VmError::Gone)));
    }

    #[tokio::test]
    async fn an_event_is_heard_whether_it_comes_before_an_answer_or_after_and_in_however_many_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (more, mut wanted) = tokio::sync::mpsc::channel::<&str>(1);
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let opening = format!("{GREETING}\n{{\"event\": \"STOP\"}}\n{{\"return\": {{}}}}\n");
            stream.write_all(opening.as_bytes()).await.unwrap();
            while let Some(piece) = wanted.recv().await {
                stream.write_all(piece.as_bytes()).await.unwrap();
            }
        });
        let mut qmp = Qmp::connect(&path).await.unwrap();
        qmp.happened("STOP").await.unwrap();
        for piece in ["{\"event\": \"RESU", "ME\"}\n{\"event\": \"ST", "OP\"", "}\n"] {
            more.send(piece).await.unwrap();
            // Cancelled in the middle of a line, again and again.
            let heard = tokio::time::timeout(Duration::from_millis(1), qmp.happened("STOP")).await;
            assert!(heard.is_err() || piece == "}\n", "{piece:?}");
            if heard.is_ok() {
                drop(more);
                server.await.unwrap();
                return;
            }
        }
        qmp.happened("STOP").await.unwrap();
        drop(more);
        server.await.unwrap();
        assert!(matches!(qmp.happened("STOP").await, Err(VmError::Gone)));
    }

    #[tokio::test]
    async fn of_more_events_than_are_kept_the_last_remain() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let server = serve(&path, GREETING, &[r#"{"return": {}}"#]);
        let mut qmp = Qmp::connect(&path).await.unwrap();
        server.await.unwrap();
        for _ in 0..EVENTS_KEPT_MAX * 2 {
            qmp.keep_event(&json!({ "event": "NOISE" }));
        }
        qmp.keep_event(&json!({ "event": "STOP" }));
        assert_eq!(qmp.events.len(), EVENTS_KEPT_MAX);
        qmp.happened("STOP").await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_needs_more_time_for_an_answer_waits_longer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let _silent = UnixListener::bind(&path).unwrap();
        let connected = Qmp::connect_patiently(&path, Duration::from_secs(77)).await;
        let error = connected.map(drop).unwrap_err();
        assert!(error.to_string().contains("within 77 s"), "{error}");
    }
}
