//! The connection to a logical unit, from the first dial through every loss to the logout.

use std::io;

use block::{Backoff, DiskError};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::address::portal_of;
use super::limits::{BACKOFF_FIRST, BACKOFF_MAX, CONNECT_TIME_MAX, REDIRECTS_MAX};
use super::login::{ALGORITHMS, Agreed, Goal, Login, LoginFault, OLD_ALGORITHMS};
use super::session::{Breach, Job, Session};
use super::unit::{Unit, survey};
use super::wire::{Door, Wire};
use super::{ConnectError, Options, Retry, shown};
use crate::login::Challenge;
use crate::pdu::login_status;

/// Makes sessions with one target.
pub(super) struct Connector {
    pub(super) host: String,
    pub(super) port: u16,
    /// The logical unit as on the wire.
    pub(super) lun: u64,
    pub(super) goal: Goal,
    pub(super) options: Options,
}

impl Connector {
    /// Dials and logs in once, following redirections.
    pub(super) async fn log_in(&self) -> Result<(Door, Agreed), ConnectError> {
        let (mut host, mut port) = (self.host.clone(), self.port);
        let (mut redirects, mut algorithms) = (0, ALGORITHMS);
        while redirects <= REDIRECTS_MAX {
            let mut door = Door::dial(&host, port).await?;
            let challenge = Challenge { id: rand::random(), bytes: rand::random() };
            let (mut login, request, text) = Login::begin(&self.goal, algorithms, challenge);
            match door.log_in(&mut login, (request, text)).await? {
                Ok(agreed) => return Ok((door, agreed)),
                Err(LoginFault::Moved(portal)) => {
                    (host, port) = moved(&portal)?;
                    redirects += 1;
                }
                // Some targets, tgt for one, cannot read a list that begins with what they do not know.
                Err(LoginFault::Refused(login_status::INITIATOR_ERROR))
                    if self.goal.secrets.initiator.is_some() && algorithms == ALGORITHMS =>
                {
                    algorithms = OLD_ALGORITHMS;
                }
                Err(fault) => return Err(ConnectError::of_login(&fault)),
            }
        }
        Err(ConnectError::Protocol(format!("it was redirected more than {REDIRECTS_MAX} times")))
    }

    /// A session with the logical unit, in bounded time, and all that there is to know of it.
    pub(super) async fn connect(&self) -> Result<(Wire, Unit), ConnectError> {
        let attempt = async {
            let (door, agreed) = self.log_in().await?;
            let mut wire = door.open(Session::new(agreed, self.lun));
            let unit = survey(&mut wire).await?;
            Ok((wire, unit))
        };
        tokio::time::timeout(CONNECT_TIME_MAX, attempt).await.unwrap_or(Err(ConnectError::TooSlow))
    }

    fn target(&self) -> &str {
        self.goal.target.as_ref().map_or("discovery", |target| target.as_str())
    }
}

/// The portal that a redirection names.
fn moved(portal: &str) -> Result<(String, u16), ConnectError> {
    portal_of(portal).map_err(|why| {
        ConnectError::Protocol(format!(
            "it was redirected to '{}', which is not a portal: {why}",
            shown(portal)
        ))
    })
}

/// Why a lost session cannot be taken up again.
#[derive(Debug)]
enum End {
    /// Nobody wants anything any more.
    Unwanted,
    /// It would not be the same disk.
    Useless(String),
}

/// Carries `jobs` to the logical unit until there will be no more.
pub(super) async fn run(connector: Connector, first: Wire, unit: Unit, mut jobs: mpsc::Receiver<Job>) {
    let mut wire = first;
    let mut away = Away::default();
    loop {
        let asked_before = wire.session.answered();
        let ended = wire.transmit(&mut jobs, &connector.options).await;
        if wire.session.answered() > asked_before {
            away = Away::default();
        }
        let Err(error) = ended else {
            wire.log_out().await;
            return;
        };
        let (target, outstanding) = (connector.target(), wire.session.len());
        tracing::warn!(target_name = target, outstanding, %error, "iscsi_session_lost: logging in again");
        if error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<Breach>) {
            wire.log_out().await;
        }
        let mut pending = wire.session.into_jobs();
        wire = match reconnect(&connector, &unit, &mut away, &mut pending, &mut jobs).await {
            Ok(again) => again,
            Err(End::Unwanted) => return,
            Err(End::Useless(why)) => {
                tracing::error!(target_name = target, why, "iscsi_disk_failed");
                return fail_all(pending, &mut jobs, &why).await;
            }
        };
        let now = Instant::now();
        pending.into_iter().for_each(|job| wire.session.add(job, now));
    }
}

/// How long the target has been away. It is back only when it answers a command: one that takes a login and
/// drops the connection at the first command is not dialled in a tight loop.
struct Away {
    since: Instant,
    backoff: Backoff,
}

impl Default for Away {
    fn default() -> Away {
        Away { since: Instant::now(), backoff: Backoff::at_once(BACKOFF_FIRST, BACKOFF_MAX) }
    }
}

/// Logs in until there is a session with the same unit.
async fn reconnect(
    connector: &Connector,
    unit: &Unit,
    away: &mut Away,
    pending: &mut Vec<Job>,
    jobs: &mut mpsc::Receiver<Job>,
) -> Result<Wire, End> {
    if away.backoff.is_fresh() {
        away.since = Instant::now();
    }
    let mut told = None;
    loop {
        let pause = away.backoff.pause();
        let attempt = async {
            tokio::time::sleep(pause).await;
            connector.connect().await
        };
        let why = tokio::select! {
            connected = attempt => match connected {
                Ok((_, now)) if now.size_bytes != unit.size_bytes => {
                    return Err(End::Useless(resized(unit.size_bytes, now.size_bytes)));
                }
                Ok((wire, now)) if unit.can_be(&now) => {
                    tracing::info!(target_name = connector.target(), "iscsi_session_back");
                    return Ok(wire);
                }
                Ok(_) => "there is another logical unit now, or it can do less".to_owned(),
                Err(error) => error.to_string(),
            },
            () = give_up(connector.options.retry, away.since, pending, jobs) => return Err(End::Unwanted),
        };
        // A target that is away says the same each time; what is new is told to a person.
        if told.as_ref() != Some(&why) {
            tracing::warn!(target_name = connector.target(), why, "iscsi_target_away");
            told = Some(why);
        }
    }
}

/// What is said of a unit whose size is not what it was.
pub(super) fn resized(before: u64, now: u64) -> String {
    format!("the logical unit had {before} bytes and has {now} now: open it anew")
}

/// Fails what waits as soon as it has waited for too long, and whatever comes then. Ends when there will be no
/// more jobs.
async fn give_up(retry: Retry, since: Instant, pending: &mut Vec<Job>, jobs: &mut mpsc::Receiver<Job>) {
    let Retry::For(limit) = retry else {
        return std::future::pending().await;
    };
    tokio::time::sleep_until(since + limit).await;
    let why = format!("the iSCSI target was away for more than {limit:?}");
    fail_all(std::mem::take(pending), jobs, &why).await;
}

/// Fails all that waits and all that comes, until there will be no more.
async fn fail_all(pending: Vec<Job>, jobs: &mut mpsc::Receiver<Job>, why: &str) {
    // Whoever no longer waits needs no answer.
    let fail = |job: Job| {
        let _ = job.done.send(Err(DiskError::Io(why.to_owned())));
    };
    pending.into_iter().for_each(fail);
    while let Some(job) = jobs.recv().await {
        fail(job);
    }
}

impl From<Breach> for io::Error {
    fn from(breach: Breach) -> io::Error {
        io::Error::other(breach)
    }
}
