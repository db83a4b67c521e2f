//! A client of QEMU's control protocol (QMP): one connection for a few commands, then gone.
//!
//! QEMU serves one client at a time; a second waits in the socket's backlog until the first has left, so
//! connections are held for milliseconds only. Events that arrive between answers are skipped. A connection
//! whose future was cancelled is closed, which QEMU takes as the client's leaving.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Take};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::VmError;

/// How long QEMU may take for the greeting or an answer. Its main loop answers within milliseconds; it is
/// silent for longer only while it is stuck in I/O.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Most bytes of one answer; the longest that we ask for is a few KiB.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Events skipped while waiting for one answer; more than this is not QEMU.
const EVENTS_MAX: usize = 1000;

/// A connection that has been through the greeting.
pub(super) struct Qmp {
    lines: BufReader<Take<OwnedReadHalf>>,
    writer: OwnedWriteHalf,
}

impl Qmp {
    /// Connects to the control socket at `path`.
    pub(super) async fn connect(path: &Path) -> Result<Qmp, VmError> {
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
        let mut qmp = Qmp { lines: BufReader::new(reader.take(ANSWER_BYTES_MAX)), writer };
        let greeting = qmp.line().await?;
        if greeting.get("QMP").is_none() {
            return Err(VmError::Control("it did not greet as QEMU does".to_owned()));
        }
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs one command and gives what it returned.
    pub(super) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, VmError> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        self.writer.write_all(request.as_bytes()).await.map_err(|_| VmError::Gone)?;
        for _ in 0..EVENTS_MAX {
            let mut answer = self.line().await?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(VmError::Control(format!("{command} failed: {reason}")));
            }
        }
        Err(VmError::Control(format!("{command} got no answer among {EVENTS_MAX} events")))
    }

    async fn line(&mut self) -> Result<Value, VmError> {
        self.lines.get_mut().set_limit(ANSWER_BYTES_MAX);
        let mut line = Vec::new();
        let read = tokio::time::timeout(ANSWER_TIMEOUT, self.lines.read_until(b'\n', &mut line)).await;
        match read {
            Err(_) => Err(VmError::Control(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
            Ok(Err(_) | Ok(0)) => Err(VmError::Gone),
            Ok(Ok(_)) => serde_json::from_slice(&line)
                .map_err(|error| VmError::Control(format!("its answer is no JSON: {error}"))),
        }
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
        assert!(error.to_string().contains("eject failed: no such thing"), "{error}");
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
}
