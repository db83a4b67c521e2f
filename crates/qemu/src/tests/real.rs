//! A Debian guest with all that a VM is made of: agent, network, seed, a disk that is written to.

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::super::agent::AgentError;
use super::super::state::RunState;
use super::*;

/// Counts on the console, and each number is durable on the disk before it is printed.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i | dd of=/root/n conv=fsync 2>/dev/null; \
    [ $(cat /root/n) = $i ] && echo beat $i; done >/dev/ttyS0";

/// Gives one command to the guest's agent and returns its answer.
async fn ask_agent(vm: &Qemu, request: serde_json::Value) -> serde_json::Value {
    let mut stream = UnixStream::connect(vm.files.agent_socket()).await.unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).await.unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await.unwrap();
    serde_json::from_str(&line).unwrap()
}

/// The numbers after `beat` on these consoles, one after the other.
fn beats(benches: &[&Bench]) -> Vec<u64> {
    let text: String =
        benches.iter().map(|b| fs::read_to_string(b.vm_dir().join("console.log")).unwrap()).collect();
    let whole = regex::Regex::new(r"beat (\d+)\r\n").unwrap();
    whole.captures_iter(&text).map(|found| found[1].parse().unwrap()).collect()
}

#[tokio::test]
#[ignore = "takes a minute without KVM: set VIRTMAN_GUEST_IMAGE to an image made by scripts/guest-image"]
async fn a_debian_guest_is_frozen_and_thawed_and_moves_while_it_writes() {
    let image = std::env::var("VIRTMAN_GUEST_IMAGE").expect("VIRTMAN_GUEST_IMAGE names an image");
    let Some(here) = Bench::on_image(&image) else { return };
    let Some(there) = Bench::without_disk("qcow2") else { return };
    let accel = AccelMode::Auto.decide().await.unwrap().accel;
    let name = "guest-7".parse().unwrap();
    let identity = seed::Identity::new(&name, &"i-1".parse().unwrap(), &[]).unwrap();
    for bench in [&here, &there] {
        fs::write(bench.path("seed"), identity.disk().unwrap()).unwrap();
    }
    let seed = Some(here.path("seed"));
    let spec = VmSpec { name, seed, accel, memory_mib: 512, forward_ports: vec![22], ..here.spec() };
    let source = Qemu::start(&here.vm_dir(), &spec).await.unwrap();

    let early = source.freeze(Duration::from_millis(1)).await.err().expect("the firmware has no agent");
    assert!(matches!(early, AgentError::Silent(_)), "{early}");
    Ready::Agent.wait(&source, PATIENCE).await.unwrap();
    let frozen = source.freeze(PATIENCE).await.unwrap();
    let filesystems = frozen.filesystems();
    assert!(filesystems >= 1);
    assert_eq!(frozen.thaw(PATIENCE).await.unwrap(), filesystems);
    // A daemon that dies in between leaves this.
    ask_agent(&source, serde_json::json!({ "execute": "guest-fsfreeze-freeze" })).await;
    assert_eq!(source.agent().thaw_if_frozen(PATIENCE).await.unwrap(), Some(filesystems));
    assert_eq!(source.agent().thaw_if_frozen(PATIENCE).await.unwrap(), None);
    drop(source.freeze(PATIENCE).await.unwrap());
    assert_eq!(source.agent().thaw_if_frozen(PATIENCE).await.unwrap(), None, "who forgets it thaws it");

    // Cloud-init is done with the console by then.
    wait_for(&source, "^guest-7 login:").await.unwrap();
    let arguments = serde_json::json!({ "path": "/bin/sh", "arg": ["-c", COUNTER] });
    ask_agent(&source, serde_json::json!({ "execute": "guest-exec", "arguments": arguments })).await;
    wait_for(&source, "beat 10$").await.unwrap();

    let disk = VmDisk { socket: here.path("nbd.sock"), export: "vm-1".to_owned(), serial: None };
    let seed = Some(there.path("seed"));
    let spec = VmSpec { disk, seed, ..source.spec().unwrap().clone() };
    let target = Qemu::start_incoming(&there.vm_dir(), &spec).await.unwrap();
    let incoming = target.incoming_listen().await.unwrap();
    let migration = source.begin_migration(&target.memory_socket(), None).await.unwrap();
    let paused = migration.until_paused(|progress| println!("{progress:?}")).await.unwrap();
    println!("{:?}", hand_over(paused, incoming).await);
    source.kill().await.unwrap();
    target.resume().await.unwrap();
    assert_eq!(target.state().await.unwrap(), RunState::Running);

    let arrived = beats(&[&here]).len();
    wait_for(&target, &format!("beat {}\r?$", arrived + 10)).await.unwrap();
    let beats = beats(&[&here, &there]);
    assert!(beats.iter().copied().eq(1..=beats.len() as u64), "each number once, in order: {beats:?}");
    Ready::Agent.wait(&target, PATIENCE).await.unwrap();
    Ready::Tcp(22).wait(&target, PATIENCE).await.unwrap();
    assert_eq!(target.stop(PATIENCE).await.unwrap(), Stopped::ByGuest);
}

#[tokio::test]
#[ignore = "takes half a minute without KVM: set VIRTMAN_ISCSI_GUEST to what scripts/iscsi-guest made"]
async fn a_guest_whose_kernel_came_from_outside_moves_to_where_the_same_kernel_is() {
    let initrd =
        PathBuf::from(std::env::var("VIRTMAN_ISCSI_GUEST").expect("VIRTMAN_ISCSI_GUEST names a guest"));
    let (Some(here), Some(there)) = (Bench::new(), Bench::new()) else { return };
    let accel = AccelMode::Auto.decide().await.unwrap().accel;
    let kernel = initrd.with_extension("vmlinuz");
    let append = "console=ttyS0 quiet net.ifnames=0".to_owned();
    let boot = Some(DirectBoot { kernel, initrd: Some(initrd), append });
    let spec = VmSpec { accel, memory_mib: 512, boot, ..here.spec() };
    let source = Qemu::start(&here.vm_dir(), &spec).await.unwrap();
    Ready::Agent.wait(&source, PATIENCE).await.unwrap();

    let mut spec = VmSpec { disk: there.spec().disk, ..source.spec().unwrap().clone() };
    let boot = spec.boot.clone().unwrap();
    spec.boot = Some(DirectBoot { kernel: "/no/such/kernel".into(), ..boot.clone() });
    let refused = Qemu::start_incoming(&there.vm_dir(), &spec).await.unwrap_err();
    assert!(refused.to_string().contains("/no/such/kernel"), "{refused}");
    spec.boot = Some(boot);
    let target = Qemu::start_incoming(&there.vm_dir(), &spec).await.unwrap();
    let incoming = target.incoming_listen().await.unwrap();
    let migration = source.begin_migration(&target.memory_socket(), None).await.unwrap();
    let paused = migration.until_paused(|_| {}).await.unwrap();
    hand_over(paused, incoming).await;
    source.kill().await.unwrap();
    target.resume().await.unwrap();
    Ready::Agent.wait(&target, PATIENCE).await.unwrap();
    target.kill().await.unwrap();
}

#[tokio::test]
#[ignore = "takes a minute without KVM: set VIRTMAN_GUEST_IMAGE to an image made by scripts/guest-image"]
async fn a_debian_guest_takes_its_name_from_the_seed_and_shuts_down_when_asked() {
    let image = std::env::var("VIRTMAN_GUEST_IMAGE").expect("VIRTMAN_GUEST_IMAGE names an image");
    let Some(bench) = Bench::on_image(&image) else { return };
    let choice = AccelMode::Auto.decide().await.unwrap();
    println!("{choice}");
    let name = "guest-7".parse().unwrap();
    let seed =
        seed::Identity::new(&name, &"i-1".parse().unwrap(), &["ssh-ed25519 AAAA me".to_owned()]).unwrap();
    fs::write(bench.path("seed"), seed.disk().unwrap()).unwrap();
    let mut spec = bench.spec();
    spec.name = name;
    spec.accel = choice.accel;
    spec.memory_mib = 512;
    spec.seed = Some(bench.path("seed"));
    spec.forward_ports = vec![22];

    let vm = Qemu::start(&bench.vm_dir(), &spec).await.unwrap();
    let first = wait_for(&vm, ".").await.unwrap();
    bench.kill_disk_server();
    bench.serve_disk();
    let login = wait_for(&vm, "^guest-7 login:").await.unwrap();
    let ssh = Ready::Tcp(22).wait(&vm, PATIENCE).await.unwrap();
    let agent = Ready::Agent.wait(&vm, PATIENCE).await.unwrap();
    println!("first output {first:?}, login {login:?}, ssh by {ssh:?}, agent by {agent:?}");
    assert_eq!(vm.stop(PATIENCE).await.unwrap(), Stopped::ByGuest);
}
