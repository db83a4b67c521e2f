//! A client of the guest agent (`qemu-ga`): whether it is there, and freezing the guest's file systems.
//!
//! The agent's channel has one client at a time, so who uses it has [`Qemu`]'s lock of it meanwhile. Each
//! connection begins with a number that the agent has to repeat, so that what was said to or asked by an
//! earlier client is over.
//!
//! - *Cancellation:* a guest whose [`Frozen`] is dropped is thawed by a task of its own. If that fails, the thaw is
//!   left as a [recovery](super::standstill) to [`Qemu::supervise`].
//! - *Crash:* a file says that a guest is being frozen, so that a later daemon thaws it.
//! - *Retries:* the first question alone is repeated, since what is said before the guest has opened the
//!   channel is lost.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use block::VmName;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::runtime::Handle;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::standstill::{Recovery, Standing};
use super::{Qemu, VmError, printable};

/// How long the agent may take to answer before it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// Longest answer of the agent in bytes; those to our questions are below 100.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;

/// Answers to earlier questions that may arrive before the one we wait for: one for each time we asked.
const STALE_ANSWERS_MAX: usize = 1000;

/// What lets a guest write again.
const THAW: &str = "guest-fsfreeze-thaw";

/// How long a guest that could not be frozen, or was forgotten, may take to thaw.
const THAW_TIMEOUT: Duration = Duration::from_secs(10);

/// What can go wrong between us and the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Nobody answers.
    #[error(
        "no guest agent answers within {} s: install and start qemu-guest-agent in the guest, or wait until it \
         has booted", .0.as_secs_f32()
    )]
    Silent(Duration),
    /// The agent does not know this, or must not.
    #[error(
        "the guest agent takes no {0}: it is too old, or forbids it (see its options --block-rpcs and \
         --allow-rpcs)"
    )]
    Unable(&'static str),
    /// The agent tried, and says what happened.
    #[error("the guest agent's {command} failed: {reason}")]
    Failed {
        /// What it was asked for.
        command: &'static str,
        /// Its own words.
        reason: String,
    },
    /// There was an answer in the beginning and none to this.
    #[error("the guest agent did not end its {command} within {} s", .timeout.as_secs_f32())]
    Late {
        /// What it was asked for.
        command: &'static str,
        /// How long that was waited for.
        timeout: Duration,
    },
    /// The channel cannot be used.
    #[error(transparent)]
    Vm(#[from] VmError),
}

/// A guest whose file systems are consistent on its disk and stay so: what it writes waits. Thaws when dropped.
#[must_use = "a frozen guest does next to nothing"]
pub struct Frozen {
    notes: Notes,
    /// What it takes to thaw it, until it is.
    held: Option<(Agent, OwnedMutexGuard<()>)>,
    filesystems: u64,
}

/// Where it is noted that a guest's file systems are frozen.
#[derive(Clone)]
struct Notes {
    vm: VmName,
    file: PathBuf,
    standing: Arc<Standing>,
}

impl Notes {
    /// Before the guest is frozen. The file need not survive a power cut, which ends the guest too.
    fn begin(&self) -> Result<(), AgentError> {
        Ok(std::fs::write(&self.file, b"").map_err(VmError::file(&self.file))?)
    }

    /// Once the guest is thawed.
    fn end(&self) {
        self.standing.finish(Recovery::Thaw);
        if let Err(error) = std::fs::remove_file(&self.file)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(vm = %self.vm, %error, "guest_thaw_not_recorded");
        }
    }
}

impl Qemu {
    /// The guest's agent.
    pub(crate) fn agent(&self) -> GuestAgent<'_> {
        GuestAgent { vm: self }
    }

    /// Freezes the guest's file systems. If that fails or takes longer than `timeout`, they are thawed again.
    pub async fn freeze(&self, timeout: Duration) -> Result<Frozen, AgentError> {
        let begun = Instant::now();
        let way = self.agent();
        let (agent, channel) = way.reach(timeout).await?;
        Frozen::freeze(way.notes(), agent, channel, timeout.saturating_sub(begun.elapsed())).await
    }
}

/// The way to a guest's agent.
pub(crate) struct GuestAgent<'a> {
    vm: &'a Qemu,
}

impl GuestAgent<'_> {
    fn notes(&self) -> Notes {
        Notes {
            vm: self.vm.name().clone(),
            file: self.vm.files.frozen(),
            standing: Arc::clone(&self.vm.standing),
        }
    }

    /// Thaws the guest's file systems if they are frozen, as they are after a daemon died between
    /// [`Qemu::freeze`] and [`Frozen::thaw`]. Gives how many were.
    pub(crate) async fn thaw_if_frozen(&self, timeout: Duration) -> Result<Option<u64>, AgentError> {
        let begun = Instant::now();
        let (agent, channel) = self.reach(timeout).await?;
        let rest = || timeout.saturating_sub(begun.elapsed());
        match Frozen::find(self.notes(), agent, channel, rest()).await? {
            Some(frozen) => frozen.thaw(rest()).await.map(Some),
            None => {
                self.notes().end();
                Ok(None)
            }
        }
    }

    /// The agent that answers, and the right to talk to it.
    async fn reach(&self, timeout: Duration) -> Result<(Agent, OwnedMutexGuard<()>), AgentError> {
        let reached = async {
            let channel = self.vm.turns.agent().await;
            let agent = Agent::over(self.stream().await?).await;
            Ok((agent.map_err(VmError::file(self.vm.files.agent_socket()))?, channel))
        };
        tokio::time::timeout(timeout, reached).await.map_err(|_| AgentError::Silent(timeout))?
    }

    /// Waits until the guest's agent answers. Leaves the channel to others between two attempts.
    pub(crate) async fn answers(&self) -> Result<(), VmError> {
        loop {
            let _channel = self.vm.turns.agent().await;
            let answer = ping(self.stream().await?);
            if let Ok(answered) = tokio::time::timeout(ASK_AGAIN, answer).await {
                return answered.map_err(VmError::file(self.vm.files.agent_socket()));
            }
        }
    }

    async fn stream(&self) -> Result<UnixStream, VmError> {
        let path = self.vm.files.agent_socket();
        UnixStream::connect(&path).await.map_err(VmError::file(path))
    }
}

async fn ping(stream: UnixStream) -> io::Result<()> {
    let mut agent = Agent::over(stream).await?;
    agent.execute("guest-ping").await.map(drop).map_err(io::Error::other)
}

impl Frozen {
    async fn freeze(
        notes: Notes,
        agent: Agent,
        channel: OwnedMutexGuard<()>,
        timeout: Duration,
    ) -> Result<Frozen, AgentError> {
        notes.begin()?;
        let vm = notes.vm.clone();
        // Thaws on every way out from here on.
        let mut frozen = Frozen { notes, held: Some((agent, channel)), filesystems: 0 };
        match frozen.agent().execute_within(timeout, "guest-fsfreeze-freeze").await {
            Ok(count) => frozen.filesystems = count.as_u64().unwrap_or_default(),
            Err(AgentError::Unable(command)) => {
                frozen.held = None;
                frozen.notes.end();
                return Err(AgentError::Unable(command));
            }
            Err(error) => {
                if let Err(thaw) = frozen.thaw(THAW_TIMEOUT).await {
                    tracing::warn!(%vm, %thaw, "guest_partly_frozen");
                }
                return Err(error);
            }
        }
        Ok(frozen)
    }

    /// What an earlier client left frozen.
    async fn find(
        notes: Notes,
        mut agent: Agent,
        channel: OwnedMutexGuard<()>,
        timeout: Duration,
    ) -> Result<Option<Frozen>, AgentError> {
        let status = agent.execute_within(timeout, "guest-fsfreeze-status").await?;
        Ok((status == "frozen").then(|| Frozen { notes, held: Some((agent, channel)), filesystems: 0 }))
    }

    /// How many file systems are frozen; 0 if the guest has none that can be.
    pub fn filesystems(&self) -> u64 {
        self.filesystems
    }

    /// Lets the guest write again. Gives how many file systems were frozen until now: fewer than
    /// [`filesystems`](Self::filesystems) means that somebody else thawed some before.
    pub async fn thaw(mut self, timeout: Duration) -> Result<u64, AgentError> {
        let late = |_| AgentError::Late { command: THAW, timeout };
        let thawed = tokio::time::timeout(timeout, self.agent().thaw()).await.map_err(late)??;
        self.held = None;
        self.notes.end();
        Ok(thawed)
    }

    fn agent(&mut self) -> &mut Agent {
        let (agent, _) = self.held.as_mut().expect("it is held until the guest is thawed, which is the end");
        agent
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let Some((mut agent, channel)) = self.held.take() else { return };
        // QEMU forgets what it was told by a client that has left, so an answer has to be waited for. Where that
        // is impossible the daemon ends, and the next one finds the guest.
        if let Ok(runtime) = Handle::try_current() {
            let notes = self.notes.clone();
            runtime.spawn(async move {
                let reason = match tokio::time::timeout(THAW_TIMEOUT, agent.thaw()).await {
                    Ok(Ok(_)) => return notes.end(),
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => AgentError::Late { command: THAW, timeout: THAW_TIMEOUT }.to_string(),
                };
                tracing::error!(vm = %notes.vm, reason, "guest_not_thawed: it is tried again and again");
                drop((agent, channel));
                notes.standing.request(Recovery::Thaw, Some(reason));
            });
        }
    }
}

/// A connection to an agent that answers.
struct Agent {
    lines: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Agent {
    /// Waits until there is an answer.
    async fn over(stream: UnixStream) -> io::Result<Agent> {
        let (reader, writer) = stream.into_split();
        let mut agent = Agent { lines: BufReader::new(reader), writer };
        agent.synchronize().await?;
        Ok(agent)
    }

    /// Asks the agent to repeat a number until it does (`guest-sync`).
    async fn synchronize(&mut self) -> io::Result<()> {
        loop {
            // Not a number that an earlier client may have asked for.
            let asked: u32 = rand::random();
            let sync = json!({ "execute": "guest-sync", "arguments": { "id": asked } });
            // 0xff resets the agent's parser, whatever half a request an earlier client left in it.
            self.writer.write_all(&[&[0xff], sync.to_string().as_bytes(), b"\n"].concat()).await?;
            let repeated = self.repeats(asked);
            if let Ok(repeated) = tokio::time::timeout(ASK_AGAIN, repeated).await {
                return repeated;
            }
        }
    }

    /// Reads until the agent returns this number, skipping answers to earlier questions and of earlier clients.
    async fn repeats(&mut self, number: u32) -> io::Result<()> {
        for _ in 0..STALE_ANSWERS_MAX {
            let answer = self.answer().await?;
            if answer.get("return") == Some(&json!(number)) {
                return Ok(());
            }
        }
        Err(io::Error::other("the guest agent gives only answers to other questions"))
    }

    async fn execute_within(
        &mut self,
        timeout: Duration,
        command: &'static str,
    ) -> Result<Value, AgentError> {
        let late = |_| AgentError::Late { command, timeout };
        tokio::time::timeout(timeout, self.execute(command)).await.map_err(late)?
    }

    async fn thaw(&mut self) -> Result<u64, AgentError> {
        // There may be an answer on the way to something that is no longer waited for.
        self.synchronize().await.map_err(|_| VmError::Gone)?;
        Ok(self.execute(THAW).await?.as_u64().unwrap_or_default())
    }

    async fn execute(&mut self, command: &'static str) -> Result<Value, AgentError> {
        let request = json!({ "execute": command }).to_string() + "\n";
        self.writer.write_all(request.as_bytes()).await.map_err(|_| VmError::Gone)?;
        let mut answer = self.answer().await.map_err(|_| VmError::Gone)?;
        if let Some(value) = answer.get_mut("return") {
            return Ok(value.take());
        }
        let error = &answer["error"];
        match error["class"].as_str() {
            // It says the same of what it does not know and of what it must not do.
            Some("CommandNotFound") => Err(AgentError::Unable(command)),
            _ => {
                let reason = printable(error["desc"].as_str().unwrap_or("no reason given"));
                Err(AgentError::Failed { command, reason })
            }
        }
    }

    /// The next line; null if it is not JSON.
    async fn answer(&mut self) -> io::Result<Value> {
        let mut line = Vec::new();
        match (&mut self.lines).take(ANSWER_BYTES_MAX).read_until(b'\n', &mut line).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(serde_json::from_slice(&line).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::Mutex;
    use tokio::task::JoinHandle;

    const MOMENT: Duration = Duration::from_secs(1);

    /// An agent that repeats each number it is asked for and answers each other command with the next of
    /// `answers`, if that is not empty. Gives the commands that it was asked for, once its channel closes.
    fn agent(server: UnixStream, answers: &'static [&'static str]) -> JoinHandle<Vec<String>> {
        tokio::spawn(async move {
            let (reader, mut writer) = server.into_split();
            let mut reader = BufReader::new(reader);
            let (mut asked, mut answers) = (Vec::new(), answers.iter());
            loop {
                let mut line = Vec::new();
                if reader.read_until(b'\n', &mut line).await.unwrap() == 0 {
                    return asked;
                }
                let json = line.strip_prefix(&[0xff]).unwrap_or(&line);
                let request: Value = serde_json::from_slice(json).unwrap();
                let command = request["execute"].as_str().unwrap();
                let answer = match command {
                    "guest-sync" => json!({ "return": request["arguments"]["id"] }).to_string(),
                    _ => {
                        asked.push(command.to_owned());
                        (*answers.next().expect("one more answer")).to_owned()
                    }
                };
                if !answer.is_empty() {
                    // Who dropped the connection does not read it.
                    let _ = writer.write_all(format!("{answer}\n").as_bytes()).await;
                }
            }
        })
    }

    /// The channel of one guest, and where it is noted that it is frozen.
    struct Guest {
        dir: tempfile::TempDir,
        channel: Arc<Mutex<()>>,
        standing: Arc<Standing>,
    }

    impl Guest {
        fn new() -> Guest {
            let dir = tempfile::tempdir().unwrap();
            Guest { dir, channel: Arc::default(), standing: Arc::default() }
        }

        fn notes(&self) -> Notes {
            let file = self.dir.path().join("frozen");
            Notes { vm: "vm-1".parse().unwrap(), file, standing: Arc::clone(&self.standing) }
        }

        fn is_noted(&self) -> bool {
            self.notes().file.exists()
        }

        async fn freeze(&self, client: UnixStream) -> Result<Frozen, AgentError> {
            let agent = Agent::over(client).await.unwrap();
            let channel = Arc::clone(&self.channel).lock_owned().await;
            Frozen::freeze(self.notes(), agent, channel, MOMENT).await
        }
    }

    #[tokio::test]
    async fn a_frozen_guest_is_thawed_when_asked_and_when_forgotten() {
        let vm = Guest::new();
        let (client, server) = UnixStream::pair().unwrap();
        let asked = agent(server, &[r#"{"return": 3}"#, r#"{"return": 3}"#]);
        let guest = vm.freeze(client).await.unwrap();
        assert_eq!(guest.filesystems(), 3);
        assert!(vm.is_noted(), "a later daemon has to know");
        assert_eq!(guest.thaw(MOMENT).await.unwrap(), 3);
        assert_eq!(asked.await.unwrap(), ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);

        let (client, server) = UnixStream::pair().unwrap();
        let asked = agent(server, &[r#"{"return": 1}"#, r#"{"return": 1}"#]);
        drop(vm.freeze(client).await.unwrap());
        assert_eq!(asked.await.unwrap(), ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
        // The channel is free again.
        drop(vm.channel.lock().await);
        assert!(!vm.is_noted() && !vm.standing.is_due(Recovery::Thaw));
    }

    #[tokio::test]
    async fn what_a_guest_gives_as_a_reason_cannot_act_upon_a_terminal_and_is_bounded() {
        let words = format!("\u{1b}]0;mine\u{7}\n{}", "x".repeat(30_000));
        let answer = json!({ "error": { "class": "GenericError", "desc": words } }).to_string().leak();
        let (client, server) = UnixStream::pair().unwrap();
        let asked = agent(server, vec![&*answer].leak());
        let error = Agent::over(client).await.unwrap().execute(THAW).await.unwrap_err().to_string();
        assert!(!error.contains(char::is_control) && error.contains("mine"), "{error:?}");
        assert!(error.chars().count() < 3000, "{}", error.len());
        asked.await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_does_not_thaw_stays_due_until_a_later_thaw() {
        let vm = Guest::new();
        let (client, server) = UnixStream::pair().unwrap();
        const FAILURE: &str = r#"{"error": {"class": "GenericError", "desc": "out of memory"}}"#;
        let asked = agent(server, &[r#"{"return": 1}"#, FAILURE, FAILURE]);
        let guest = vm.freeze(client).await.unwrap();
        let error = guest.thaw(MOMENT).await.unwrap_err();
        assert!(error.to_string().contains("out of memory"), "{error}");
        assert_eq!(asked.await.unwrap().len(), 3, "it is told once more by itself");
        vm.standing.requested().await;
        let standstill = vm.standing.standstill().unwrap();
        assert!(standstill.cause.to_string().contains("out of memory"), "{standstill:?}");
        assert!(vm.is_noted());

        let (client, server) = UnixStream::pair().unwrap();
        let asked = agent(server, &[r#"{"return": "frozen"}"#, r#"{"return": 1}"#]);
        let agent = Agent::over(client).await.unwrap();
        let channel = Arc::clone(&vm.channel).lock_owned().await;
        let guest = Frozen::find(vm.notes(), agent, channel, MOMENT).await.unwrap().expect("it is frozen");
        guest.thaw(MOMENT).await.unwrap();
        asked.await.unwrap();
        assert!(vm.standing.standstill().is_none() && !vm.is_noted());
    }

    #[tokio::test]
    async fn a_freeze_that_fails_or_hangs_is_thawed() {
        let vm = Guest::new();
        let (client, server) = UnixStream::pair().unwrap();
        const FAILURE: &str = r#"{"error": {"class": "GenericError", "desc": "failed to freeze /"}}"#;
        let asked = agent(server, &[FAILURE, r#"{"return": 1}"#]);
        let error = vm.freeze(client).await.err().expect("it fails");
        assert!(error.to_string().contains("failed to freeze /"), "{error}");
        assert_eq!(asked.await.unwrap(), ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);

        tokio::time::pause();
        let (client, server) = UnixStream::pair().unwrap();
        let asked = agent(server, &["", r#"{"return": 1}"#]);
        let error = vm.freeze(client).await.err().expect("it hangs");
        assert!(matches!(error, AgentError::Late { command: "guest-fsfreeze-freeze", .. }), "{error}");
        assert_eq!(asked.await.unwrap(), ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
    }

    #[tokio::test]
    async fn an_agent_that_cannot_freeze_is_told_apart_from_one_that_fails() {
        let vm = Guest::new();
        let (client, server) = UnixStream::pair().unwrap();
        let asked = agent(server, &[r#"{"error": {"class": "CommandNotFound", "desc": "disabled"}}"#]);
        let error = vm.freeze(client).await.err().expect("it cannot");
        assert!(matches!(error, AgentError::Unable("guest-fsfreeze-freeze")), "{error}");
        assert_eq!(asked.await.unwrap(), ["guest-fsfreeze-freeze"], "there is nothing to thaw");
        assert!(!vm.is_noted());
    }

    #[tokio::test]
    async fn what_an_earlier_client_left_frozen_is_found() {
        for (status, found) in [("frozen", true), ("thawed", false)] {
            let vm = Guest::new();
            let (client, server) = UnixStream::pair().unwrap();
            let answers: &[&str] = match found {
                true => &[r#"{"return": "frozen"}"#, r#"{"return": 2}"#],
                false => &[r#"{"return": "thawed"}"#],
            };
            let asked = agent(server, answers);
            let agent = Agent::over(client).await.unwrap();
            let channel = Arc::clone(&vm.channel).lock_owned().await;
            let guest = Frozen::find(vm.notes(), agent, channel, MOMENT).await.unwrap();
            assert_eq!(guest.is_some(), found, "{status}");
            if let Some(guest) = guest {
                assert_eq!(guest.thaw(MOMENT).await.unwrap(), 2);
            }
            asked.await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_agent_is_ready_when_it_answers_our_question_and_not_anothers() {
        let (client, server) = UnixStream::pair().unwrap();
        let agent = tokio::spawn(async move {
            let (reader, mut writer) = server.into_split();
            let mut reader = BufReader::new(reader);
            writer.write_all(b"half an ans\n{\"return\": 77}\n{\"return\": {}}\n").await.unwrap();
            let mut line = Vec::new();
            reader.read_until(b'\n', &mut line).await.unwrap();
            assert_eq!(line.remove(0), 0xff, "the parser is reset first");
            let sync: Value = serde_json::from_slice(&line).unwrap();
            let answer = json!({ "return": sync["arguments"]["id"] });
            writer.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
            line.clear();
            reader.read_until(b'\n', &mut line).await.unwrap();
            assert_eq!(serde_json::from_slice::<Value>(&line).unwrap()["execute"], "guest-ping");
            writer.write_all(b"{\"return\": {}}\n").await.unwrap();
        });
        ping(client).await.unwrap();
        agent.await.unwrap();
    }

    #[tokio::test]
    async fn an_agent_channel_that_closes_is_an_error() {
        let (client, server) = UnixStream::pair().unwrap();
        drop(server);
        assert!(ping(client).await.is_err());
    }
}
