//! The initiator's login against the target's, and against targets that do not behave.

use super::*;
use crate::chap::Credentials;
use crate::login::{self, Admission, Directory, Refusal};

fn ours() -> Option<Credentials> {
    Credentials::new("node", b"correct horse").ok()
}

fn theirs() -> Option<Credentials> {
    Credentials::new("disk", b"battery staple").ok()
}

fn goal(initiator: Option<Credentials>, target: Option<Credentials>) -> Goal {
    Goal {
        initiator: "iqn.2026-01.test:node".parse().unwrap(),
        target: "iqn.2026-01.test:disk".parse().ok(),
        isid: Isid([0x80, 1, 2, 3, 4, 5]),
        secrets: Secrets { initiator, target },
        digests: "CRC32C,None",
    }
}

/// A target that asks for these secrets.
struct Doors(Option<Credentials>, Option<Credentials>);

impl Directory for Doors {
    fn discovery(&self, _: &IscsiName) -> Result<Admission, Refusal> {
        Ok(Admission { initiator: self.0.clone(), target: self.1.clone(), ..Admission::default() })
    }

    fn target(&self, initiator: &IscsiName, _: &IscsiName) -> Result<Admission, Refusal> {
        self.discovery(initiator)
    }
}

fn challenge(id: u8) -> Challenge {
    Challenge { id, bytes: [id; 32] }
}

/// Both sides of a login: what ours comes to, what the target's comes to, and the text that went to it.
fn meet(goal: &Goal, doors: &Doors) -> (Result<Agreed, LoginFault>, Option<login::Agreed>, String) {
    let mut target = login::Login::new(challenge(1), 1, 7);
    let (mut own, mut request, mut text) = Login::begin(goal, ALGORITHMS, challenge(2));
    let mut said = String::new();
    let mut done = None;
    loop {
        said += &String::from_utf8_lossy(&text);
        let (response, answer, step) = target.feed(&request, &text, doors);
        if let login::Step::Done(agreed) = step {
            done = Some(agreed);
        }
        match own.feed(&response, &answer) {
            Ok(Step::Send(next, more)) => (request, text) = (next, more),
            Ok(Step::Done(agreed)) => return (Ok(agreed), done, said),
            Err(fault) => return (Err(fault), done, said),
        }
    }
}

#[test]
fn both_sides_end_with_the_same() {
    let cases = [
        (goal(None, None), Doors(None, None)),
        (goal(ours(), None), Doors(None, None)),
        (goal(ours(), None), Doors(ours(), None)),
        (goal(ours(), theirs()), Doors(ours(), theirs())),
    ];
    for (goal, doors) in cases {
        let (own, target, said) = meet(&goal, &doors);
        let (own, target) = (own.unwrap(), target.unwrap());
        assert_eq!(own.parameters.digests, target.parameters.digests);
        assert_eq!(own.parameters.burst_bytes_max, target.parameters.burst_bytes_max);
        assert_eq!(own.parameters.immediate_data, target.parameters.immediate_data);
        assert_eq!((own.cmd_sn, own.exp_stat_sn), (target.cmd_sn, target.stat_sn));
        assert!(own.max_cmd_sn > own.cmd_sn, "the window is open");
        let asked = goal.secrets.initiator.is_some() && doors.0.is_some();
        assert_eq!(said.contains("CHAP_A=7,5"), asked, "{said}");
        assert!(!said.contains("correct horse"), "{said}");
    }
}

#[test]
fn who_cannot_prove_himself_is_told_so() {
    let wrong = Credentials::new("node", b"incorrect horse").ok();
    for initiator in [None, wrong] {
        let (refused, target, _) = meet(&goal(initiator, None), &Doors(ours(), None));
        assert_eq!(refused, Err(LoginFault::Refused(login_status::AUTHENTICATION)));
        assert_eq!(target, None);
    }
}

#[test]
fn a_target_with_another_secret_is_not_believed() {
    let other = Credentials::new("disk", b"battery acid 12").ok();
    let (doubted, target, said) = meet(&goal(ours(), theirs()), &Doors(ours(), other));
    assert_eq!(doubted, Err(LoginFault::Unproven));
    assert_eq!(target, None, "nothing operational was said yet");
    assert!(!said.contains("MaxBurstLength"), "{said}");
}

/// A response with these flags and this text.
fn say(login: &mut Login<'_>, flags: u8, text: &str) -> Result<Step, LoginFault> {
    login.feed(&LoginResponse { flags, ..LoginResponse::default() }, text.as_bytes())
}

const TO_OPERATIONAL: u8 = stage::TRANSIT | stage::OPERATIONAL;
const TO_FULL: u8 = stage::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE;

#[test]
fn a_target_that_skips_the_proof_is_not_believed() {
    let mutual = goal(ours(), theirs());
    let begin = || Login::begin(&mutual, ALGORITHMS, challenge(2)).0;
    for (flags, text) in [
        (TO_OPERATIONAL, "AuthMethod=None\0"),
        (0, "AuthMethod=None\0"),
        (0, "\0"),
        (TO_FULL, ""),
        (stage::OPERATIONAL << 2, ""),
        (stage::TRANSIT | stage::FULL_FEATURE, "AuthMethod=CHAP\0"),
    ] {
        let refused = say(&mut begin(), flags, text);
        assert!(matches!(refused, Err(LoginFault::Protocol(_))), "{flags:#x} {text}: {refused:?}");
    }
    let mut login = begin();
    say(&mut login, 0, "AuthMethod=CHAP\0").unwrap();
    say(&mut login, 0, "CHAP_A=7\0CHAP_I=1\0CHAP_C=0x0102030405060708\0").unwrap();
    assert_eq!(say(&mut login, TO_OPERATIONAL, ""), Err(LoginFault::Unproven));
    // A challenge that was reflected, as if ours were one that we answer.
    let mut login = begin();
    say(&mut login, 0, "AuthMethod=CHAP\0").unwrap();
    let reflected = format!("CHAP_A=7\0CHAP_I=2\0CHAP_C={}\0", text::encode_binary(&[2; 32]));
    let Ok(Step::Send(_, own)) = say(&mut login, 0, &reflected) else { panic!("it has to be answered") };
    let own = String::from_utf8(own).unwrap();
    let response = own.split('\0').find(|pair| pair.starts_with("CHAP_R=")).unwrap();
    let repeated = format!("CHAP_N=node\0{response}\0");
    assert_eq!(say(&mut login, TO_OPERATIONAL, &repeated), Err(LoginFault::Unproven));
}

#[test]
fn only_algorithms_that_were_offered_are_used() {
    let goal = goal(ours(), None);
    let mut login = Login::begin(&goal, OLD_ALGORITHMS, challenge(2)).0;
    let Ok(Step::Send(_, text)) = say(&mut login, 0, "AuthMethod=CHAP\0") else { panic!("CHAP was offered") };
    assert_eq!(text, b"CHAP_A=5\0");
    let other = say(&mut login, 0, "CHAP_A=7\0CHAP_I=1\0CHAP_C=0x01\0");
    assert!(matches!(other, Err(LoginFault::Protocol(_))), "{other:?}");
}

#[test]
fn text_in_pieces_is_put_together_and_has_an_end() {
    let goal = goal(None, None);
    let mut login = Login::begin(&goal, ALGORITHMS, challenge(2)).0;
    let Ok(Step::Send(request, text)) = say(&mut login, stage::CONTINUE, "AuthMe") else {
        panic!("the rest is asked for")
    };
    assert_eq!((request.flags & stage::TRANSIT, text.len()), (0, 0));
    let Ok(Step::Send(request, _)) = say(&mut login, 0, "thod=None\0") else { panic!("it goes on") };
    assert_eq!(request.flags, TO_OPERATIONAL);
    let long = "x".repeat(4000);
    let endless = (0..100).find_map(|_| say(&mut login, stage::CONTINUE, &long).err());
    assert_eq!(endless, Some(LoginFault::Protocol("its login does not come to an end")));
}

#[test]
fn a_target_may_ask_too_and_leave_keys_as_they_are() {
    let goal = goal(None, None);
    let mut login = Login::begin(&goal, ALGORITHMS, challenge(2)).0;
    say(&mut login, TO_OPERATIONAL, "AuthMethod=None\0TargetPortalGroupTag=1\0").unwrap();
    let asking = "HeaderDigest=Reject\0X-com.example=1\0OFMarker=Yes\0TargetAlias=disk\0";
    let Ok(Step::Send(_, text)) = say(&mut login, stage::OPERATIONAL << 2, asking) else {
        panic!("questions are answered")
    };
    assert_eq!(text, b"X-com.example=NotUnderstood\0OFMarker=No\0");
    let answers = "MaxBurstLength=4096\0FirstBurstLength=Irrelevant\0MaxRecvDataSegmentLength=512\0";
    let Ok(Step::Done(agreed)) = say(&mut login, TO_FULL, answers) else { panic!("it is done") };
    assert_eq!(agreed.parameters.first_burst_bytes_max, 4096, "no longer than a burst");
    assert_eq!(agreed.parameters.peer_segment_bytes_max, 512);
    assert_eq!(agreed.parameters.digests.header, crate::pdu::Digest::None);
}

#[test]
fn what_a_target_says_is_fit_to_be_shown() {
    let goal = goal(None, None);
    let mut login = Login::begin(&goal, ALGORITHMS, challenge(2)).0;
    say(&mut login, TO_OPERATIONAL, "AuthMethod=None\0").unwrap();
    let odd = format!("InitialR2T=\x1b[2J{}\0", "x".repeat(1000));
    let Err(fault) = say(&mut login, TO_FULL, &odd) else { panic!("that is not an answer") };
    let told = crate::initiator::ConnectError::of_login(&fault).to_string();
    assert!(told.contains("?[2Jx") && told.len() < 300 && !told.contains('\x1b'), "{told}");
}

#[test]
fn a_target_that_has_moved_says_where_to() {
    let goal = goal(None, None);
    let moved = LoginResponse { status: 0x0102, ..LoginResponse::default() };
    let feed = |text: &[u8]| Login::begin(&goal, ALGORITHMS, challenge(2)).0.feed(&moved, text);
    let there = feed(b"TargetAddress=[fe80::1]:3261,2\0");
    assert_eq!(there, Err(LoginFault::Moved("[fe80::1]:3261".to_owned())));
    assert!(matches!(feed(b"TargetName=iqn.x\0"), Err(LoginFault::Protocol(_))));
}
