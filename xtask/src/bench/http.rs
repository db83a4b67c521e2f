//! A client of the node's API over its UNIX socket, as small as timing single requests wants it.
//!
//! One connection, kept; one request at a time.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::Outcome;

/// Longer than any request takes.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// One connection to a node.
pub(super) struct Api {
    stream: BufReader<UnixStream>,
}

impl Api {
    pub(super) fn connect(socket: &Path) -> Outcome<Api> {
        Api::connect_for(socket, ANSWER_TIME_MAX)
    }

    /// For requests whose answers are not waited for longer than `limit`.
    pub(super) fn connect_for(socket: &Path, limit: Duration) -> Outcome<Api> {
        let stream = UnixStream::connect(socket)
            .and_then(|stream| stream.set_read_timeout(Some(limit)).map(|()| stream))
            .map_err(|e| format!("cannot connect to {}: {e}", socket.display()))?;
        Ok(Api { stream: BufReader::new(stream) })
    }

    pub(super) fn put(&mut self, path: &str, body: &Value) -> Outcome<Value> {
        self.request("PUT", path, &body.to_string())
    }

    pub(super) fn get(&mut self, path: &str) -> Outcome<Value> {
        self.request("GET", path, "")
    }

    pub(super) fn delete(&mut self, path: &str) -> Outcome<Value> {
        self.request("DELETE", path, "")
    }

    fn request(&mut self, method: &str, path: &str, body: &str) -> Outcome<Value> {
        let failed = |e: std::io::Error| format!("{method} {path}: {e}");
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: node\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes()).map_err(failed)?;
        let mut status = String::new();
        self.stream.read_line(&mut status).map_err(failed)?;
        let mut body_bytes = 0;
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line).map_err(failed)? == 0 {
                return Err(format!("{method} {path}: the answer ends in its head"));
            }
            if line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                body_bytes = value.trim().parse().map_err(|e| format!("{method} {path}: {e}"))?;
            }
        }
        let mut body = vec![0; body_bytes];
        self.stream.read_exact(&mut body).map_err(failed)?;
        if status.split_whitespace().nth(1).is_none_or(|code| !code.starts_with('2')) {
            return Err(format!("{method} {path}: {} {}", status.trim(), String::from_utf8_lossy(&body)));
        }
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|e| format!("{method} {path}: {e}"))
    }
}
