//! Sessions under any sequence of PDUs, of the disk's answers and of sending, without sockets.

use std::sync::Arc;

use block::Disk;

use super::memory_budget::Budget;
use super::registry::{Registry, SessionKey};
use super::session::{Peer, Session, Stage};
use super::{Admission, Target};
use crate::limits::{COMMANDS_MAX, IMMEDIATE_COMMANDS_MAX};
use crate::login::{Agreed, Authentication};
use crate::params::Parameters;
use crate::pdu::{
    DataOut, FINAL, Frame, Header, Isid, LogoutRequest, NO_TAG, NopOut, ScsiCommand, TaskRequest, TextRequest,
};
use crate::scsi::{Identity, InitiatorPort, Nexus, OPERATION_CODES, TargetPort, Unit};

const NAME: &str = "iqn.fuzz";

/// Bytes of the input that make one step.
const STEP_BYTES: usize = 10;

/// Turns after the last step in which all that is left has to end: some for each command.
const STEPS_MAX: usize = 10_000;

/// Drives a session with a disk through these steps, and checks that it stays within its bounds, that every
/// command that does not wait for data ends, and that nothing stays booked.
pub(crate) async fn session(disk: Arc<dyn Disk>, input: &[u8]) {
    let budget = Arc::new(Budget::default());
    let mut session = begin(disk, Arc::clone(&budget)).await;
    let mut cmd_sn = 1;
    for step in input.chunks_exact(STEP_BYTES) {
        take(&mut session, step, &mut cmd_sn).await;
        let max = (COMMANDS_MAX + IMMEDIATE_COMMANDS_MAX) as usize;
        assert!(session.tasks.len() <= max, "commands under way are bounded");
        if session.stage != Stage::Open {
            break;
        }
    }
    for _ in 0..STEPS_MAX {
        others(&mut session).await;
        send(&mut session, usize::MAX);
        if session.jobs.is_empty() && session.output.bytes() == 0 {
            break;
        }
    }
    assert!(session.jobs.is_empty(), "every future has ended");
    // Others may wait for their turn behind one that waits for its data.
    let waits = session.tasks.values().any(super::tasks::Task::waits_for_data);
    assert!(session.tasks.is_empty() || waits, "a command waits for nothing");
    assert!(session.aborted.is_empty(), "nothing that was aborted is left");
    drop(session);
    assert_eq!(budget.used(), 0, "all memory is given back");
}

async fn begin(disk: Arc<dyn Disk>, budget: Arc<Budget>) -> Session {
    let unit = Unit::new(disk, Identity { serial: "fuzz".to_owned() });
    let registry = Arc::new(Registry::new(Vec::new()));
    let (name, initiator) = (NAME.parse().expect("a name"), "iqn.fuzzer".parse().expect("a name"));
    let key = SessionKey { initiator, isid: Isid([1; 6]), target: name, group: 1 };
    let target = Target {
        name: key.target.clone(),
        alias: String::new(),
        units: vec![Arc::new(unit)],
        admission: Admission::default(),
    };
    registry.add(target).expect("there is no other");
    let address = ([127, 0, 0, 1], 1).into();
    let agreed = Agreed {
        initiator: key.initiator.clone(),
        isid: key.isid,
        target: Some(key.target.clone()),
        cid: 0,
        authentication: Authentication::None,
        parameters: Parameters {
            initial_r2t: false,
            r2t_max: 2,
            burst_bytes_max: 2048,
            ..Parameters::default()
        },
        cmd_sn: 1,
        stat_sn: 1,
    };
    let membership = registry.join(key, address, Authentication::None).await.expect("the target is there");
    let port = TargetPort { name: NAME.to_owned(), group: 1, groups: vec![1] };
    let initiator = InitiatorPort { name: agreed.initiator.to_string(), isid: agreed.isid };
    let nexus = Nexus { id: membership.nexus, initiator, target: Arc::new(port) };
    membership.attach(&nexus);
    Session::new(agreed, Peer::Target(membership, nexus), registry, budget, address, 1)
}

/// One step: a PDU, or something that happens between PDUs.
async fn take(session: &mut Session, step: &[u8], cmd_sn: &mut u32) {
    let &[kind, tag, a, b, c, flags, len, transfer, offset, extra] = step else { return };
    let task_tag = u32::from(tag % 16);
    let transfer_tag = if transfer == 255 { NO_TAG } else { u32::from(transfer % 16) };
    let mut data = vec![extra; usize::from(len) * 64];
    let mut sn = || {
        let sn = *cmd_sn;
        *cmd_sn = sn.wrapping_add(1);
        sn
    };
    let header = match kind % 10 {
        0..=2 => {
            let mut cdb = [0; 16];
            cdb[0] = OPERATION_CODES[usize::from(a) % OPERATION_CODES.len()];
            (cdb[1], cdb[5], cdb[8], cdb[13]) = (extra, b, c, c);
            let expected_bytes = u32::from(offset) * 512;
            ScsiCommand { flags, task_tag, expected_bytes, cmd_sn: sn(), cdb, ..ScsiCommand::default() }
                .header()
        }
        3 | 4 => {
            let (data_sn, offset) = (u32::from(a % 4), u32::from(offset) * 64);
            DataOut { flags, task_tag, transfer_tag, data_sn, offset, ..DataOut::default() }.header()
        }
        5 => TaskRequest {
            function: FINAL | (a % 10),
            task_tag,
            cmd_sn: sn(),
            referenced_task_tag: u32::from(b % 16),
            ..TaskRequest::default()
        }
        .header(),
        6 => {
            data = [&b"SendTargets=All\0X="[..], &data].concat();
            TextRequest { flags, task_tag, transfer_tag, cmd_sn: sn(), ..TextRequest::default() }.header()
        }
        7 => NopOut { flags, task_tag, transfer_tag, cmd_sn: sn(), ..NopOut::default() }.header(),
        8 => {
            others(session).await;
            send(session, usize::from(len) * 64);
            return;
        }
        _ if extra == 0xff => {
            LogoutRequest { reason: FINAL | (a % 4), task_tag, cmd_sn: sn(), ..LogoutRequest::default() }
                .header()
        }
        _ => Header([a; crate::pdu::HEADER_BYTES]),
    };
    let header = if b & 0x80 == 0 { header } else { header.immediate() };
    if session.takes_input() {
        session.take(&Frame { header, additional: &[], data: &data, bytes: 0 });
        session.tidy();
    }
}

/// What comes from elsewhere: mail, and the ends of commands.
async fn others(session: &mut Session) {
    if let Some(active) = session.active.clone() {
        session.take_mail(active.mailbox.take());
    }
    tokio::task::yield_now().await;
    while let Some(ended) = session.jobs.try_join_next_with_id() {
        session.ended(ended).expect("the disk does not panic");
    }
}

/// Sends so many bytes at most.
fn send(session: &mut Session, bytes_max: usize) {
    let there: usize = session.output.slices().iter().map(|slice| slice.len()).sum();
    session.output.sent(there.min(bytes_max));
    session.tidy();
    session.pump();
}
