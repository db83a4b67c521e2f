//! The session, PDU by PDU.

use super::*;
use crate::initiator::scsi;
use crate::pdu::{HEADER_BYTES, event};

type Waiting = oneshot::Receiver<Result<Reply, DiskError>>;

fn session(parameters: Parameters, window: u32) -> Session {
    Session::new(Agreed { parameters, cmd_sn: 1, max_cmd_sn: window, exp_stat_sn: 1 }, 5 << 48)
}

fn small() -> Parameters {
    Parameters {
        peer_segment_bytes_max: 512,
        first_burst_bytes_max: 1024,
        burst_bytes_max: 2048,
        r2t_max: 2,
        ..Parameters::default()
    }
}

fn add(session: &mut Session, command: Command) -> Waiting {
    let (done, answer) = oneshot::channel();
    session.add(Job { command, done, hold: None }, Instant::now());
    answer
}

/// What the session sends: headers with their data.
fn sent(session: &mut Session) -> Vec<(Header, Vec<u8>)> {
    let mut out = Vec::new();
    session.fill(&mut out);
    let (mut rest, mut pdus) = (&out[..], Vec::new());
    while let Some(frame) = pdu::frame(rest, session.parameters.digests, 1 << 20).unwrap() {
        pdus.push((frame.header, frame.data.to_vec()));
        rest = &rest[frame.bytes..];
    }
    assert!(rest.is_empty(), "only whole PDUs are sent");
    pdus
}

/// Feeds a PDU byte by byte, as a slow network would.
fn feed(session: &mut Session, header: Header, data: &[u8]) -> Result<(), Breach> {
    let seal = pdu::seal(header, data, session.parameters.digests);
    let whole = [seal.head(), data, seal.tail()].concat();
    for cut in 0..whole.len() {
        assert_eq!(session.feed(&whole[..cut])?, 0);
    }
    assert_eq!(session.feed(&whole)?, whole.len());
    Ok(())
}

fn read(len: u32) -> Command {
    scsi::read(0, len / 512, len)
}

fn data_in(tag: u32, sn: u32, offset: u32, flags: u8) -> Header {
    let (task_tag, data_sn, max_cmd_sn) = (tag, sn, 9);
    DataIn { flags: FINAL | flags, task_tag, data_sn, offset, max_cmd_sn, ..DataIn::default() }.header()
}

fn r2t(tag: u32, sn: u32, offset: u32, wanted_bytes: u32) -> Header {
    let (task_tag, r2t_sn, transfer_tag) = (tag, sn, 70 + sn);
    R2t { flags: FINAL, task_tag, r2t_sn, transfer_tag, offset, wanted_bytes, ..R2t::default() }.header()
}

fn response(tag: u32, status: u8) -> Header {
    ScsiResponse { flags: FINAL, task_tag: tag, status, max_cmd_sn: 9, ..ScsiResponse::default() }.header()
}

#[test]
fn a_read_is_put_together_from_its_pieces() {
    let mut session = session(small(), 9);
    let mut answer = add(&mut session, read(1024));
    let pdus = sent(&mut session);
    let command = ScsiCommand::parse(&pdus[0].0);
    assert_eq!((command.expected_bytes, command.lun, command.cmd_sn), (1024, 5 << 48, 1));
    assert_eq!(command.flags, FINAL | command::READ | SIMPLE);
    feed(&mut session, data_in(0, 0, 0, 0), &[1; 600]).unwrap();
    assert!(answer.try_recv().is_err(), "it is not complete");
    feed(&mut session, data_in(0, 1, 600, data_in::STATUS), &[2; 424]).unwrap();
    let reply = answer.try_recv().unwrap().unwrap();
    assert!(reply.is_whole && reply.data == [vec![1; 600], vec![2; 424]].concat());
    assert_eq!((session.len(), session.answered()), (0, 1));
}

#[test]
fn a_short_read_is_told_as_one() {
    let mut session = session(small(), 9);
    let mut answer = add(&mut session, read(1024));
    sent(&mut session);
    feed(&mut session, data_in(0, 0, 0, data_in::STATUS), &[1; 1023]).unwrap();
    assert!(!answer.try_recv().unwrap().unwrap().is_whole);
}

#[test]
fn data_that_was_not_asked_for_is_a_breach() {
    let cases = [
        (data_in(0, 0, 0, 0), 1025),
        (data_in(0, 0, 1, 0), 512),
        (data_in(0, 1, 0, 0), 512),
        (data_in(0, 0, u32::MAX, 0), 512),
        (data_in(7, 0, 0, 0), 512),
    ];
    for (header, len) in cases {
        let mut session = session(small(), 9);
        let mut answer = add(&mut session, read(1024));
        sent(&mut session);
        assert!(feed(&mut session, header, &vec![1; len]).is_err(), "{len} bytes");
        assert!(answer.try_recv().is_err(), "nobody is answered with them");
    }
    let mut session = session(small(), 9);
    let _answer = add(&mut session, scsi::write(0, 1, &[0; 512]));
    assert!(feed(&mut session, data_in(0, 0, 0, 0), &[1; 512]).is_err());
}

#[test]
fn a_write_goes_out_at_once_as_far_as_it_may_and_then_as_it_is_asked_for() {
    let mut session = session(small(), 9);
    let data: Vec<u8> = (0..4096u32).map(|i| (i / 16) as u8).collect();
    let mut answer = add(&mut session, scsi::write(0, 8, &data));
    let pdus = sent(&mut session);
    assert_eq!((pdus.len(), &pdus[0].1[..]), (1, &data[..512]));
    feed(&mut session, r2t(0, 0, 512, 1024), &[]).unwrap();
    feed(&mut session, r2t(0, 1, 1536, 2560), &[]).unwrap();
    let pdus = sent(&mut session);
    let places: Vec<_> = pdus
        .iter()
        .map(|(header, data)| {
            let pdu = DataOut::parse(header);
            (pdu.transfer_tag, pdu.data_sn, pdu.offset as usize, data.len(), pdu.flags)
        })
        .collect();
    let whole = |tag, sn, at| (tag, sn, at, 512, 0);
    let last = |tag, sn, at| (tag, sn, at, 512, FINAL);
    let first = [whole(70, 0, 512), last(70, 1, 1024)];
    let second =
        [whole(71, 0, 1536), whole(71, 1, 2048), whole(71, 2, 2560), whole(71, 3, 3072), last(71, 4, 3584)];
    assert_eq!(places, [&first[..], &second].concat());
    assert!(pdus.iter().all(|(h, d)| *d == data[DataOut::parse(h).offset as usize..][..d.len()]));
    feed(&mut session, response(0, 0), &[]).unwrap();
    assert!(answer.try_recv().unwrap().unwrap().is_whole);
}

#[test]
fn a_write_that_is_confirmed_before_all_of_it_went_out_is_not_whole() {
    let mut session = session(small(), 9);
    let mut answer = add(&mut session, scsi::write(0, 8, &[7; 4096]));
    sent(&mut session);
    feed(&mut session, response(0, 0), &[]).unwrap();
    assert!(!answer.try_recv().unwrap().unwrap().is_whole);
    // Data that was asked for before is not sent any more.
    let mut answer = add(&mut session, scsi::write(0, 8, &[7; 4096]));
    sent(&mut session);
    feed(&mut session, r2t(1, 0, 512, 512), &[]).unwrap();
    feed(&mut session, response(1, 2), &[0, 2, 0x70, 0]).unwrap();
    assert_eq!(answer.try_recv().unwrap().unwrap().sense, [0x70, 0]);
    assert!(sent(&mut session).is_empty());
}

#[test]
fn no_more_is_sent_than_was_asked_for_in_order_and_within_bounds() {
    let cases =
        [r2t(0, 0, 512, 4096), r2t(0, 0, 0, 512), r2t(0, 0, 512, 0), r2t(0, 1, 512, 512), r2t(3, 0, 0, 1)];
    for header in cases {
        let mut session = session(small(), 9);
        let _answer = add(&mut session, scsi::write(0, 8, &[7; 4096]));
        sent(&mut session);
        assert!(feed(&mut session, header, &[]).is_err());
    }
    let mut session = session(small(), 9);
    let _answer = add(&mut session, scsi::write(0, 8, &[7; 4096]));
    sent(&mut session);
    feed(&mut session, r2t(0, 0, 512, 1), &[]).unwrap();
    feed(&mut session, r2t(0, 1, 513, 1), &[]).unwrap();
    assert!(feed(&mut session, r2t(0, 2, 514, 1), &[]).is_err(), "two were agreed");
}

#[test]
fn commands_wait_until_the_window_opens() {
    let mut session = session(small(), 2);
    let mut answers: Vec<_> = (0..4).map(|_| add(&mut session, read(512))).collect();
    assert_eq!(sent(&mut session).len(), 2);
    let ping =
        NopIn { flags: FINAL, task_tag: NO_TAG, transfer_tag: NO_TAG, exp_cmd_sn: 3, ..NopIn::default() };
    feed(&mut session, NopIn { max_cmd_sn: 1, ..ping }.header(), &[]).unwrap();
    assert_eq!(sent(&mut session).len(), 0, "a window that closes says nothing");
    feed(&mut session, NopIn { max_cmd_sn: 3, ..ping }.header(), &[]).unwrap();
    assert_eq!(sent(&mut session).len(), 1);
    // Whoever gave up before his command was sent is spared it on the next connection.
    drop(answers.remove(3));
    let jobs = session.into_jobs();
    assert_eq!(jobs.len(), 4);
    let mut next = self::session(small(), 9);
    jobs.into_iter().for_each(|job| next.add(job, Instant::now()));
    assert_eq!(sent(&mut next).len(), 3);
}

#[test]
fn what_was_not_answered_is_sent_again_in_its_order() {
    let mut first = session(small(), 9);
    let mut answers: Vec<_> = (0..40).map(|block| add(&mut first, scsi::read(block, 1, 512))).collect();
    sent(&mut first);
    feed(&mut first, data_in(3, 0, 0, data_in::STATUS), &[1; 512]).unwrap();
    assert!(answers.remove(3).try_recv().is_ok());
    let mut next = session(small(), 100);
    first.into_jobs().into_iter().for_each(|job| next.add(job, Instant::now()));
    let pdus = sent(&mut next);
    let blocks: Vec<u64> =
        pdus.iter().map(|(header, _)| scsi::number(&ScsiCommand::parse(header).cdb[2..10])).collect();
    assert_eq!(blocks, (0..40).filter(|block| *block != 3).collect::<Vec<_>>());
}

#[test]
fn pings_are_answered_and_the_answers_bounded() {
    let mut session = session(small(), 9);
    let ping = NopIn { flags: FINAL, lun: 3, task_tag: NO_TAG, transfer_tag: 77, ..NopIn::default() };
    feed(&mut session, ping.header(), &[]).unwrap();
    let pong = NopOut::parse(&sent(&mut session)[0].0);
    assert_eq!((pong.transfer_tag, pong.task_tag, pong.lun, pong.cmd_sn), (77, NO_TAG, 3, 1));
    let endless = (0..1000).find_map(|_| feed(&mut session, ping.header(), &[]).err());
    assert!(endless.is_some());
    let mut session = self::session(small(), 9);
    session.ping();
    let ping = NopOut::parse(&sent(&mut session)[0].0);
    assert!(ping.task_tag != NO_TAG && ping.transfer_tag == NO_TAG);
}

#[test]
fn a_refused_command_fails_and_a_damaged_one_is_sent_again() {
    for (reason, fails) in [(0x09, true), (DATA_DIGEST, false)] {
        let mut session = session(small(), 9);
        let mut answer = add(&mut session, read(512));
        let command = sent(&mut session)[0].0;
        let reject = Reject { flags: FINAL, reason, task_tag: NO_TAG, ..Reject::default() };
        assert_eq!(feed(&mut session, reject.header(), &command.0).is_ok(), fails);
        assert_eq!(matches!(answer.try_recv(), Ok(Err(DiskError::Io(_)))), fails);
        assert_eq!(session.into_jobs().len(), usize::from(!fails));
    }
}

#[test]
fn a_target_that_leaves_loses_no_command() {
    for event in [event::LOGOUT_REQUESTED, event::SESSION_DROPPED] {
        let mut session = session(small(), 9);
        let _answer = add(&mut session, read(512));
        sent(&mut session);
        let message = Async { flags: FINAL, task_tag: NO_TAG, event, ..Async::default() };
        assert_eq!(feed(&mut session, message.header(), &[]), Err(Breach::Leaving));
        session.logout();
        let logout = sent(&mut session)[0].0;
        assert_eq!((logout.opcode(), logout.0.len()), (LogoutRequest::OPCODE, HEADER_BYTES));
        assert_eq!(session.into_jobs().len(), 1);
    }
}

#[test]
fn what_a_target_never_sends_is_a_breach() {
    let mut session = session(small(), 9);
    let mut header = NopIn::default().header();
    header.0[0] = 0x3e;
    assert!(feed(&mut session, header, &[]).is_err());
    header.set_data_bytes(SEGMENT_BYTES_MAX as usize + 1);
    assert!(session.feed(&header.0).is_err(), "more than was declared");
}
