//! Commands that come too early, against a QEMU that is played by this process: it refuses what it is told to.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::super::standstill::Cause;
use super::super::*;
use super::{Command, Duration, fs};

const TOO_EARLY: &str = "Migration is not finalized yet";

/// What the QEMU that is played does.
struct Script {
    /// How often it refuses each `cont`, before it takes it.
    refusals: u32,
    /// The class of these refusals.
    class: &'static str,
    /// Its state, in QEMU's words.
    state: &'static str,
    /// How often it was told to go on.
    told: u32,
}

/// A VM's directory with control sockets behind which there is no QEMU, and a process that is taken for one.
struct Played {
    dir: tempfile::TempDir,
    process: Child,
    script: Arc<Mutex<Script>>,
    servers: Vec<JoinHandle<()>>,
}

impl Played {
    fn new(state: &'static str, refusals: u32, class: &'static str) -> Played {
        let dir = tempfile::tempdir().unwrap();
        let pidfile = dir.path().canonicalize().unwrap().join("qemu.pid");
        let mut process = Command::new("sh")
            .args(["-c", "echo ready; read line", "-name", "guest=vm-1", "-pidfile"])
            .arg(&pidfile)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Before its first word, the kernel may not yet show the new command line.
        process.stdout.as_mut().unwrap().read_exact(&mut [0; 5]).unwrap();
        fs::write(&pidfile, process.id().to_string()).unwrap();
        let script = Arc::new(Mutex::new(Script { refusals, class, state, told: 0 }));
        let servers = ["qmp.sock", "events.sock"].map(|name| {
            let listener = UnixListener::bind(dir.path().join(name)).unwrap();
            let script = Arc::clone(&script);
            tokio::spawn(async move {
                // One client at a time, as QEMU does.
                while let Ok((stream, _)) = listener.accept().await {
                    serve(stream, &script).await;
                }
            })
        });
        Played { dir, process, script, servers: servers.into() }
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    fn qemu(&self) -> Qemu {
        Qemu::adopt(self.dir.path()).expect("the process is taken for a QEMU")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        self.servers.iter().for_each(JoinHandle::abort);
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

async fn serve(stream: UnixStream, script: &Mutex<Script>) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    let _ = writer.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n").await;
    while let Ok(Some(line)) = lines.next_line().await {
        let request: Value = serde_json::from_str(&line).unwrap();
        let answer = answer(request["execute"].as_str().unwrap(), &mut script.lock().unwrap());
        if writer.write_all(format!("{answer}\n").as_bytes()).await.is_err() {
            return;
        }
    }
}

fn answer(command: &str, script: &mut Script) -> Value {
    match command {
        "query-status" => json!({ "return": { "status": script.state } }),
        "query-migrate" => json!({ "return": { "status": "completed" } }),
        "cont" => {
            script.told += 1;
            if script.refusals > 0 {
                script.refusals -= 1;
                return json!({ "error": { "class": script.class, "desc": TOO_EARLY } });
            }
            script.state = "running";
            json!({ "return": {} })
        }
        _ => json!({ "return": {} }),
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_qemu_does_not_let_go_on_yet_is_told_again_until_it_does() {
    let played = Played::new("finish-migrate", 5, "GenericError");
    let vm = played.qemu();
    vm.resume().await.unwrap();
    assert_eq!(played.script().told, 6);
    assert_eq!(vm.standstill(), None);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_qemu_keeps_for_long_is_shown_and_goes_on_once_it_may() {
    let played = Played::new("postmigrate", u32::MAX, "GenericError");
    let vm = played.qemu();
    let supervised = super::sendable(vm.supervise(|| true));
    let guest = async {
        let error = vm.resume().await.unwrap_err();
        assert!(error.to_string().contains(TOO_EARLY), "{error}");
        let standstill = vm.standstill().expect("it stands still");
        assert!(
            matches!(&standstill.cause, Cause::NotResumed(why) if why.contains(TOO_EARLY)),
            "{standstill:?}"
        );
        let told = played.script().told;
        while played.script().told < told + 3 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(vm.standstill().map(|now| now.since), Some(standstill.since));
        played.script().refusals = 0;
        while vm.standstill().is_some() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(played.script().state, "running");
    };
    tokio::select! {
        () = supervised => panic!("the process ended"),
        () = guest => {}
    }
}

#[tokio::test(start_paused = true)]
async fn what_no_waiting_helps_against_is_told_at_once_and_tried_more_seldom() {
    let played = Played::new("postmigrate", u32::MAX, "CommandNotFound");
    let vm = played.qemu();
    vm.resume().await.unwrap_err();
    assert_eq!(played.script().told, 1);
    assert!(vm.standstill().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_starts_lets_a_guest_go_on_whose_move_came_to_nothing_however_long_qemu_refuses() {
    let played = Played::new("postmigrate", 3, "GenericError");
    let vm = played.qemu();
    vm.recover();
    tokio::select! {
        () = vm.supervise(|| true) => panic!("the process ended"),
        () = async {
            while played.script().state != "running" || vm.standstill().is_some() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        } => {}
    }
    assert_eq!(played.script().told, 4);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_stands_still_for_a_reason_of_its_own_is_shown_and_left_as_it_is() {
    let played = Played::new("internal-error", 0, "GenericError");
    let vm = played.qemu();
    tokio::select! {
        () = vm.supervise(|| true) => panic!("the process ended"),
        () = async {
            while vm.standstill().is_none() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        } => {}
    }
    assert_eq!(vm.standstill().unwrap().cause.to_string(), "QEMU says 'internal-error'");
    assert_eq!(played.script().told, 0);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_was_frozen_when_its_daemon_died_is_shown_until_it_is_thawed() {
    let played = Played::new("running", 0, "GenericError");
    fs::write(played.path("frozen"), b"").unwrap();
    let vm = played.qemu();
    vm.recover();
    // Nobody answers at the agent's socket.
    tokio::select! {
        () = vm.supervise(|| true) => panic!("the process ended"),
        () = async {
            tokio::time::sleep(Duration::from_secs(100)).await;
        } => {}
    }
    let standstill = vm.standstill().expect("it may be frozen");
    assert!(matches!(standstill.cause, Cause::NotThawed(_)), "{standstill:?}");
    assert!(played.path("frozen").exists());
}
