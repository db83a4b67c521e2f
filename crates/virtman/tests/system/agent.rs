//! The guest agent of a test's guest: runs commands inside it, without its network or its console.
//!
//! Speaks to `qemu-ga` through the socket that the product gives every VM. The agent forgets whatever it
//! is told before it has opened its side of the channel, hence the handshake in [`Agent::of`].

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::tools::wait_for;

/// How long the agent may take to come up after the login prompt, and a command in the guest to end. The
/// guest runs without KVM, and beside others.
const AGENT_LIMIT: Duration = Duration::from_secs(600);

/// After this long without an answer the agent is asked again during the handshake.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// A connection to the agent of one guest.
pub(crate) struct Agent {
    guest: String,
    stream: BufReader<UnixStream>,
}

impl Agent {
    /// Connects to the agent of `vm` on `node` and waits until it answers.
    pub(crate) fn of(cluster: &Cluster, node: &str, vm: &str) -> Agent {
        let path = cluster.node_dir(node).join("vms").join(vm).join("agent.sock");
        let stream = UnixStream::connect(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Agent::over(stream, vm)
    }

    /// Takes a connection to the channel of `guest`'s agent, and waits until that answers.
    pub(crate) fn over(stream: UnixStream, guest: &str) -> Agent {
        stream.set_read_timeout(Some(ASK_AGAIN)).unwrap();
        let mut agent = Agent { guest: guest.to_owned(), stream: BufReader::new(stream) };
        let mut asked = 0;
        wait_for(&format!("the agent of {guest} answers"), AGENT_LIMIT, || {
            asked += 1;
            // 0xff resets the agent's parser, whatever an earlier client left in it.
            agent.stream.get_mut().write_all(b"\xff").unwrap();
            agent.ask("guest-sync", &json!({ "id": asked }));
            // Answers to what was asked before may come first; silence means to ask again.
            let mut answers = std::iter::from_fn(|| agent.answer(ASK_AGAIN));
            answers.find(|answer| answer["return"] == asked).map(drop)
        });
        agent
    }

    /// Runs a shell script in the guest, which must succeed, and returns its standard output.
    pub(crate) fn run(&mut self, script: &str) -> String {
        let pid = self.start(script);
        let done = wait_for(&format!("'{script}' ends in {}", self.guest), AGENT_LIMIT, || {
            let status = self.call("guest-exec-status", &json!({ "pid": pid }));
            (status["exited"] == true).then_some(status)
        });
        let text = |field: &str| {
            let bytes = BASE64.decode(done[field].as_str().unwrap_or_default()).unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        assert_eq!(done["exitcode"], 0, "'{script}' in {}: {}", self.guest, text("err-data"));
        text("out-data")
    }

    /// Starts a shell script in the guest and leaves it running. Returns its process number there.
    pub(crate) fn start(&mut self, script: &str) -> u64 {
        let arguments = json!({ "path": "/bin/sh", "arg": ["-c", script], "capture-output": true });
        self.call("guest-exec", &arguments)["pid"].as_u64().expect("a process number")
    }

    fn call(&mut self, command: &str, arguments: &Value) -> Value {
        self.ask(command, arguments);
        let answer = self.answer(AGENT_LIMIT);
        let answer = answer.unwrap_or_else(|| panic!("the agent of {} is silent: {command}", self.guest));
        assert!(answer["error"].is_null(), "{command} in {}: {answer}", self.guest);
        answer["return"].clone()
    }

    fn ask(&mut self, command: &str, arguments: &Value) {
        let question = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{question}\n").as_bytes()).unwrap();
    }

    /// The next answer; none if it takes longer than `limit`.
    fn answer(&mut self, limit: Duration) -> Option<Value> {
        let begun = Instant::now();
        let mut line = Vec::new();
        loop {
            match self.stream.read_until(b'\n', &mut line) {
                Ok(0) => panic!("the guest {} has ended", self.guest),
                // A line that is not JSON is the rest of an answer to an earlier client.
                Ok(_) => match serde_json::from_slice(&line) {
                    Ok(answer) => return Some(answer),
                    Err(_) => line.clear(),
                },
                Err(e) if e.kind() == ErrorKind::WouldBlock && begun.elapsed() < limit => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return None,
                Err(e) => panic!("the agent of {}: {e}", self.guest),
            }
        }
    }
}
