//! The login phase state by state, in order and out of it.

use super::*;
use crate::chap::Algorithm;

const INITIATOR: &str = "InitiatorName=iqn.2026-01.test:host\0";
const NORMAL: &str = "InitiatorName=iqn.2026-01.test:host\0TargetName=iqn.2026-01.test:disk\0";
const CHALLENGE: Challenge = Challenge { id: 7, bytes: [0xa5; CHALLENGE_BYTES] };

/// Requests of the security stage: to stay, and to go on.
const SECURITY: u8 = stage::SECURITY << 2;
const TO_OPERATIONAL: u8 = stage::TRANSIT | SECURITY | stage::OPERATIONAL;
const TO_FULL_FEATURE: u8 = stage::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE;

/// A target that asks, or not, and knows an answer, or not.
#[derive(Default)]
struct Doors {
    initiator: Option<Credentials>,
    target: Option<Credentials>,
}

impl Directory for Doors {
    fn discovery(&self, _: &IscsiName) -> Result<Admission, Refusal> {
        Ok(Admission::default())
    }

    fn target(&self, _: &IscsiName, target: &IscsiName) -> Result<Admission, Refusal> {
        match target.as_str() {
            "iqn.2026-01.test:disk" => {
                let (initiator, target) = (self.initiator.clone(), self.target.clone());
                Ok(Admission { initiator, target, alias: "a disk".to_owned() })
            }
            "iqn.2026-01.test:private" => Err(Refusal::Forbidden),
            _ => Err(Refusal::Unknown),
        }
    }
}

fn node() -> Credentials {
    Credentials::new("node", b"correct horse").unwrap()
}

fn disk() -> Credentials {
    Credentials::new("disk", b"battery staple").unwrap()
}

/// An initiator's side of one login.
struct Client {
    login: Login,
    doors: Doors,
}

impl Client {
    fn of(doors: Doors) -> Client {
        Client { login: Login::new(CHALLENGE, 3, 9), doors }
    }

    fn free() -> Client {
        Client::of(Doors::default())
    }

    fn asked() -> Client {
        Client::of(Doors { initiator: Some(node()), target: None })
    }

    fn mutual() -> Client {
        Client::of(Doors { initiator: Some(node()), target: Some(disk()) })
    }

    /// A client that was sent our challenge for this algorithm.
    fn challenged(mut self, algorithm: u32) -> Client {
        assert_eq!(self.send(SECURITY, &format!("{NORMAL}AuthMethod=CHAP\0")).0, Ok(None));
        let (step, answer) = self.send(SECURITY, &format!("CHAP_A={algorithm}\0"));
        assert_eq!(step, Ok(None));
        let challenge = text::encode_binary(&CHALLENGE.bytes);
        assert_eq!(answer, format!("CHAP_A={algorithm}\0CHAP_I=7\0CHAP_C={challenge}\0"));
        self
    }

    fn request(&mut self, request: LoginRequest, text: &str) -> (Result<Option<Agreed>, u16>, String) {
        let (response, out, step) = self.login.feed(&request, text.as_bytes(), &self.doors);
        let out = String::from_utf8(out).unwrap();
        match step {
            Step::Continue => {
                assert_eq!((response.status, response.tsih), (login_status::SUCCESS, 0));
                (Ok(None), out)
            }
            Step::Done(agreed) => {
                assert_eq!((response.status, response.tsih), (login_status::SUCCESS, 9));
                (Ok(Some(agreed)), out)
            }
            Step::Refused(status) => {
                assert_eq!((response.status, &*out), (status, ""), "nothing else is told");
                (Err(status), out)
            }
        }
    }

    fn send(&mut self, flags: u8, text: &str) -> (Result<Option<Agreed>, u16>, String) {
        self.request(LoginRequest { flags, ..LoginRequest::default() }, text)
    }

    fn refused(&mut self, flags: u8, text: &str) -> u16 {
        self.send(flags, text).0.expect_err("the login is refused")
    }

    /// What proves the secret of these credentials.
    fn proof(credentials: &Credentials, algorithm: Algorithm, id: u8, challenge: &[u8]) -> String {
        let response = credentials.respond(algorithm, id, challenge);
        format!("CHAP_N={}\0CHAP_R={}\0", credentials.user(), text::encode_binary(&response))
    }
}

#[test]
fn one_request_is_enough_where_nothing_has_to_be_proved() {
    let mut client = Client::free();
    let (step, answer) = client.send(TO_FULL_FEATURE, &format!("{NORMAL}HeaderDigest=CRC32C\0X-a=1\0"));
    let agreed = step.unwrap().expect("it is done");
    assert_eq!(agreed.authentication, Authentication::None);
    assert_eq!(agreed.target.unwrap().as_str(), "iqn.2026-01.test:disk");
    assert_eq!(
        answer,
        "HeaderDigest=CRC32C\0X-a=NotUnderstood\0MaxRecvDataSegmentLength=262144\0TargetPortalGroupTag=3\0TargetAlias=a disk\0"
    );
}

#[test]
fn all_stages_may_be_gone_through_and_operational_keys_may_come_early() {
    let mut client = Client::free();
    let (step, answer) =
        client.send(TO_OPERATIONAL, &format!("{NORMAL}AuthMethod=None\0MaxBurstLength=4096\0"));
    assert_eq!(step, Ok(None));
    assert!(answer.starts_with("AuthMethod=None\0MaxBurstLength=4096\0"), "{answer}");
    let (step, answer) = client.send(stage::OPERATIONAL << 2, "FirstBurstLength=65536\0");
    assert_eq!((step, &*answer), (Ok(None), "FirstBurstLength=65536\0MaxRecvDataSegmentLength=262144\0"));
    let (step, answer) = client.send(TO_FULL_FEATURE, "");
    assert_eq!(answer, "", "nothing is told twice");
    let agreed = step.unwrap().expect("it is done");
    assert_eq!((agreed.parameters.burst_bytes_max, agreed.parameters.first_burst_bytes_max), (4096, 4096));
}

#[test]
fn text_may_be_spread_over_requests_but_not_without_end() {
    let mut client = Client::free();
    let (first, second) = NORMAL.split_at(20);
    let operational = stage::OPERATIONAL << 2;
    assert_eq!(client.send(operational | stage::CONTINUE, first), (Ok(None), String::new()));
    assert!(client.send(TO_FULL_FEATURE, second).0.unwrap().is_some());

    let mut client = Client::free();
    let long = "x".repeat(TEXT_BYTES_MAX);
    assert_eq!(client.send(operational | stage::CONTINUE, &long).0, Ok(None));
    assert_eq!(client.refused(operational, "y"), login_status::OUT_OF_RESOURCES);
}

#[test]
fn endless_requests_are_refused() {
    let mut client = Client::free();
    assert_eq!(client.send(stage::OPERATIONAL << 2, NORMAL).0, Ok(None));
    for _ in 1..LOGIN_REQUESTS_MAX {
        assert_eq!(client.send(stage::OPERATIONAL << 2, "").0, Ok(None));
    }
    assert_eq!(client.refused(TO_FULL_FEATURE, ""), login_status::OUT_OF_RESOURCES);
}

#[test]
fn stages_are_gone_through_forwards_and_one_at_a_time() {
    let wrong_at_first = [
        stage::FULL_FEATURE << 2,
        2 << 2,
        stage::TRANSIT | SECURITY | stage::SECURITY,
        stage::TRANSIT | SECURITY | 2,
        stage::TRANSIT | stage::OPERATIONAL << 2 | stage::SECURITY,
        stage::TRANSIT | stage::OPERATIONAL << 2 | stage::OPERATIONAL,
        TO_FULL_FEATURE | stage::CONTINUE,
    ];
    for flags in wrong_at_first {
        assert_eq!(Client::free().refused(flags, NORMAL), login_status::INVALID_REQUEST, "{flags:#x}");
    }
    // Neither a stage that was left nor one that was not entered.
    let mut client = Client::free();
    assert_eq!(client.send(TO_OPERATIONAL, NORMAL).0, Ok(None));
    assert_eq!(client.refused(SECURITY, ""), login_status::INVALID_REQUEST);
    let mut client = Client::free();
    assert_eq!(client.send(SECURITY, NORMAL).0, Ok(None));
    assert_eq!(client.refused(TO_FULL_FEATURE, ""), login_status::INVALID_REQUEST);
}

#[test]
fn a_login_is_about_one_connection_of_one_new_session() {
    let request = |isid: u8, cid: u16, tsih: u16| LoginRequest {
        flags: stage::OPERATIONAL << 2,
        isid: Isid([isid; 6]),
        cid,
        tsih,
        ..LoginRequest::default()
    };
    let mut client = Client::free();
    assert_eq!(client.request(request(1, 1, 0), NORMAL).0, Ok(None));
    assert_eq!(client.request(request(2, 1, 0), "").0, Err(login_status::INVALID_REQUEST));
    let mut client = Client::free();
    assert_eq!(client.request(request(1, 1, 0), NORMAL).0, Ok(None));
    assert_eq!(client.request(request(1, 2, 0), "").0, Err(login_status::INVALID_REQUEST));
    assert_eq!(Client::free().request(request(1, 1, 5), NORMAL).0, Err(login_status::NO_SESSION));
    let newer = LoginRequest { version_min: 1, ..request(1, 1, 0) };
    assert_eq!(Client::free().request(newer, NORMAL).0, Err(login_status::VERSION));
}

#[test]
fn who_and_what_has_to_be_said_at_first() {
    let refused = |text: &str| Client::free().refused(TO_FULL_FEATURE, text);
    assert_eq!(refused(""), login_status::MISSING_PARAMETER);
    assert_eq!(refused(INITIATOR), login_status::MISSING_PARAMETER, "a normal session has a target");
    assert_eq!(refused("InitiatorName=me\0"), login_status::INITIATOR_ERROR);
    assert_eq!(refused("no pair\0"), login_status::INITIATOR_ERROR);
    assert_eq!(refused(&format!("{INITIATOR}SessionType=Other\0")), login_status::SESSION_TYPE);
    assert_eq!(refused(&format!("{INITIATOR}TargetName=iqn.2026-01.test:none\0")), login_status::NOT_FOUND);
    assert_eq!(
        refused(&format!("{INITIATOR}TargetName=iqn.2026-01.test:private\0")),
        login_status::FORBIDDEN
    );
    let (step, answer) = Client::free().send(TO_FULL_FEATURE, &format!("{INITIATOR}SessionType=Discovery\0"));
    assert_eq!(step.unwrap().expect("it is done").target, None);
    assert!(!answer.contains("TargetPortalGroupTag"), "{answer}");
}

#[test]
fn chap_lets_in_who_knows_the_secret_with_either_algorithm() {
    for (number, algorithm) in [(5, Algorithm::Md5), (7, Algorithm::Sha256)] {
        let mut client = Client::asked().challenged(number);
        let proof = Client::proof(&node(), algorithm, CHALLENGE.id, &CHALLENGE.bytes);
        assert_eq!(client.send(TO_OPERATIONAL, &proof), (Ok(None), String::new()));
        let agreed = client.send(TO_FULL_FEATURE, "").0.unwrap().expect("it is done");
        assert_eq!(agreed.authentication, Authentication::Initiator);
    }
}

#[test]
fn nothing_is_agreed_before_the_secret_was_proved() {
    let refused = |mut client: Client, flags, text: &str| client.refused(flags, text);
    let authentication = login_status::AUTHENTICATION;
    // To leave the security stage out, to offer no method, or none that is wanted.
    assert_eq!(refused(Client::asked(), TO_FULL_FEATURE, NORMAL), authentication);
    assert_eq!(
        refused(Client::asked(), TO_OPERATIONAL, &format!("{NORMAL}AuthMethod=None\0")),
        authentication
    );
    // To go on with the proof still to come keeps the stage.
    let mut client = Client::asked();
    assert_eq!(client.send(TO_OPERATIONAL, NORMAL).0, Ok(None));
    assert_eq!(refused(client, TO_FULL_FEATURE, ""), login_status::INVALID_REQUEST);
    let mut client = Client::asked();
    let (step, answer) = client.send(TO_OPERATIONAL, &format!("{NORMAL}AuthMethod=CHAP,None\0"));
    assert_eq!((step, answer.starts_with("AuthMethod=CHAP\0")), (Ok(None), true), "{answer}");
    assert_eq!(refused(client, TO_FULL_FEATURE, "CHAP_A=5\0"), login_status::INVALID_REQUEST);
    // No algorithm in common, or an answer before the question.
    let offered = format!("{NORMAL}AuthMethod=CHAP\0");
    let mut client = Client::asked();
    assert_eq!(client.send(SECURITY, &offered).0, Ok(None));
    assert_eq!(refused(client, SECURITY, "CHAP_A=6,8\0"), authentication);
    let mut client = Client::asked();
    assert_eq!(client.send(SECURITY, &offered).0, Ok(None));
    let early = Client::proof(&node(), Algorithm::Md5, CHALLENGE.id, &CHALLENGE.bytes);
    assert_eq!(refused(client, TO_OPERATIONAL, &early), authentication);
}

#[test]
fn a_wrong_proof_is_refused() {
    let right = Client::proof(&node(), Algorithm::Md5, CHALLENGE.id, &CHALLENGE.bytes);
    let other_secret = Credentials::new("node", b"incorrect horse").unwrap();
    let other_user = Credentials::new("edon", b"correct horse").unwrap();
    let wrong = [
        Client::proof(&other_secret, Algorithm::Md5, CHALLENGE.id, &CHALLENGE.bytes),
        Client::proof(&other_user, Algorithm::Md5, CHALLENGE.id, &CHALLENGE.bytes),
        Client::proof(&node(), Algorithm::Sha256, CHALLENGE.id, &CHALLENGE.bytes),
        // What was heard at another login.
        Client::proof(&node(), Algorithm::Md5, CHALLENGE.id + 1, &CHALLENGE.bytes),
        Client::proof(&node(), Algorithm::Md5, CHALLENGE.id, &[1; CHALLENGE_BYTES]),
        right.replace("CHAP_R=0x", "CHAP_R=zz"),
        right.replace("CHAP_R", "CHAP_X"),
        "CHAP_N=node\0CHAP_R=0x\0".to_owned(),
        String::new(),
    ];
    for proof in wrong {
        let mut client = Client::asked().challenged(5);
        assert_eq!(client.refused(TO_OPERATIONAL, &proof), login_status::AUTHENTICATION, "{proof}");
    }
    assert_eq!(Client::asked().challenged(5).send(TO_OPERATIONAL, &right).0, Ok(None));
}

#[test]
fn security_is_negotiated_once() {
    let authentication = login_status::AUTHENTICATION;
    let mut client = Client::asked().challenged(5);
    assert_eq!(client.refused(SECURITY, "CHAP_A=5\0"), authentication, "a second challenge is not given");
    let mut client = Client::asked().challenged(5);
    assert_eq!(client.refused(SECURITY, "AuthMethod=None\0"), authentication);
    let proof = Client::proof(&node(), Algorithm::Md5, CHALLENGE.id, &CHALLENGE.bytes);
    for again in ["AuthMethod=None\0", "AuthMethod=CHAP\0", "CHAP_A=5\0", &*proof] {
        let mut client = Client::asked().challenged(5);
        assert_eq!(client.send(SECURITY, &proof).0, Ok(None));
        assert_eq!(client.refused(SECURITY, again), authentication, "{again}");
    }
    let mut client = Client::free();
    assert_eq!(client.send(SECURITY, &format!("{NORMAL}AuthMethod=None\0")).0, Ok(None));
    assert_eq!(client.refused(TO_OPERATIONAL, "AuthMethod=None\0"), authentication);
}

#[test]
fn the_target_proves_itself_to_who_asks_and_has_proved_itself() {
    let question = format!("CHAP_I=200\0CHAP_C={}\0", text::encode_binary(&[9; 16]));
    let mut client = Client::mutual().challenged(7);
    let proof = Client::proof(&node(), Algorithm::Sha256, CHALLENGE.id, &CHALLENGE.bytes);
    let (step, answer) = client.send(TO_OPERATIONAL, &format!("{proof}{question}"));
    assert_eq!((step, answer), (Ok(None), Client::proof(&disk(), Algorithm::Sha256, 200, &[9; 16])));
    let agreed = client.send(TO_FULL_FEATURE, "").0.unwrap().expect("it is done");
    assert_eq!(agreed.authentication, Authentication::Mutual);

    // Nothing is computed for who did not, nor where the target has no secret of its own.
    let wrong = Client::proof(&disk(), Algorithm::Sha256, CHALLENGE.id, &CHALLENGE.bytes);
    let mut client = Client::mutual().challenged(7);
    assert_eq!(client.refused(TO_OPERATIONAL, &format!("{wrong}{question}")), login_status::AUTHENTICATION);
    let mut client = Client::asked().challenged(7);
    assert_eq!(client.refused(TO_OPERATIONAL, &format!("{proof}{question}")), login_status::AUTHENTICATION);
}

#[test]
fn our_challenge_is_not_answered_when_it_is_sent_back() {
    let proof = Client::proof(&node(), Algorithm::Md5, CHALLENGE.id, &CHALLENGE.bytes);
    let reflected = format!("CHAP_I=7\0CHAP_C={}\0", text::encode_binary(&CHALLENGE.bytes));
    let mut client = Client::mutual().challenged(5);
    assert_eq!(client.refused(TO_OPERATIONAL, &format!("{proof}{reflected}")), login_status::AUTHENTICATION);
    for unreadable in ["CHAP_I=256\0CHAP_C=0x01\0", "CHAP_I=1\0CHAP_C=01\0"] {
        let mut client = Client::mutual().challenged(5);
        assert_eq!(
            client.refused(TO_OPERATIONAL, &format!("{proof}{unreadable}")),
            login_status::AUTHENTICATION
        );
    }
}
