//! A node's API, as a program on its host would use it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::Value;

use crate::cluster::Cluster;

/// A connection to a node's socket.
pub(crate) struct Api(BufReader<UnixStream>);

impl Api {
    pub(crate) fn connect(cluster: &Cluster, node: &str) -> Api {
        Api(BufReader::new(UnixStream::connect(cluster.node_dir(node).join("api.sock")).unwrap()))
    }

    /// Asks for something that must be done.
    pub(crate) fn ok(&mut self, method: &str, path: &str, body: &str) -> Value {
        let (head, answer) = self.ask(method, path, body);
        assert!(head.starts_with("http/1.1 2"), "{method} {path}: {head}{answer}");
        if answer.is_empty() { Value::Null } else { serde_json::from_str(&answer).unwrap() }
    }

    /// Asks for something that must be refused, and gives what is said.
    pub(crate) fn refused(&mut self, method: &str, path: &str, body: &str) -> Value {
        let (head, answer) = self.ask(method, path, body);
        assert!(head.starts_with("http/1.1 4"), "{method} {path}: {head}{answer}");
        serde_json::from_str::<Value>(&answer).unwrap()["error"].clone()
    }

    fn ask(&mut self, method: &str, path: &str, body: &str) -> (String, String) {
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: node\r\ncontent-length: {length}\r\n");
        let request = format!("{head}content-type: application/json\r\n\r\n{body}");
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(self.0.read_line(&mut head).unwrap(), 0, "the node hung up: {head}");
        }
        let head = head.to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut answer = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        self.0.read_exact(&mut answer).unwrap();
        (head, String::from_utf8(answer).unwrap())
    }
}
