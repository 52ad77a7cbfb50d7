//! Steps that are larger than `shard_size`, in pieces: every worker that has time does some, and the one
//! that has the step commits them all.
//!
//! ```text
//!  the step's worker                                  any worker
//!  job ─► plan.json, notes ─► a message for each ─────► claims the piece, does it:
//!    │                                                 its files lie in the table's folder, unnamed
//!    ├─ does pieces itself that nobody has             │
//!    └─ all of 0.json, 1.json … ◄──────────────────────┘ what it made, put if absent
//!         └─► one commit
//! ```
//! The plan is there as long as somebody waits for its pieces: a message that comes later finds nothing to do.
//! Where no other worker has time the step's worker does all pieces, one after the other; where there can be none
//! (one slot in one process, one step by itself) there are no pieces.

mod board;
pub(crate) mod of_ingest;
pub(crate) mod of_merge;
pub(crate) mod of_optimize;
mod of_search;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use alluvium_protocol::heartbeat::Amount;
use alluvium_protocol::lease::{Claim, Leases};
use alluvium_protocol::queue::{Lane, Message, Queue};
use alluvium_protocol::retry::CRASHES_MAX;
use alluvium_protocol::task::{FORMAT_MAJOR, Report, Task, Work, encode};
use alluvium_protocol::trace;
use alluvium_protocol::{Class, Code, Error, Pipeline, Result, crash};
use alluvium_table::Add;
use alluvium_table::write::Written;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use uuid::Uuid;

use self::board::{Board, Outcome};
use crate::keeper::Held;
use crate::slots::LEASE_TTL;
use crate::tables::Tables;
use crate::{Permit, Workshop};

/// Most pieces of a step.
pub(crate) const PIECES_MAX: usize = 64;
/// Between two looks at what others have done: at first, and at most.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];
/// So often a piece is tried by the step's worker.
const TRIES: u32 = 3;

/// The other workers, as one of them reaches them.
#[derive(Clone)]
pub struct Team {
    /// Pieces go there.
    pub queue: Arc<dyn Queue>,
    /// Who has which piece.
    pub leases: Arc<dyn Leases>,
    /// Who claims.
    pub owner: String,
    /// Where leases are renewed.
    pub keeping: Handle,
}

/// A step's work in pieces, on exactly the snapshots that it names.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Job {
    Ingest(of_ingest::Job),
    Merge(of_merge::Job),
    Search(of_search::Job),
    Optimize(of_optimize::Job),
}

/// What a piece made, and found.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Product {
    /// New data files, which no commit names yet, and their rows.
    adds: Vec<Add>,
    rows: u64,
    of_ingest: Option<of_ingest::Findings>,
    of_merge: Option<of_merge::Findings>,
    of_search: Option<of_search::Findings>,
}

impl Product {
    fn of(written: Written) -> Self {
        Self { adds: written.adds, rows: written.rows, ..Self::default() }
    }
}

impl Job {
    fn pieces(&self) -> usize {
        match self {
            Self::Ingest(job) => job.parts.len(),
            Self::Merge(job) => job.ranges(),
            Self::Search(job) => job.parts.len(),
            Self::Optimize(job) => job.bins.len(),
        }
    }

    async fn carry_out(
        &self,
        (tables, board): (&Tables, &Board),
        pipeline: &Pipeline,
        number: usize,
        permit: &Permit,
    ) -> Result<Product> {
        match self {
            Self::Ingest(job) => job.carry_out((tables, board), pipeline, number, permit).await,
            Self::Merge(job) => job.carry_out(tables, pipeline, number, permit).await,
            Self::Search(job) => job.carry_out((tables, board), pipeline, number, permit).await,
            Self::Optimize(job) => job.carry_out(tables, pipeline, number, permit).await,
        }
    }
}

impl Job {
    /// The pieces in the order in which the step's worker begins them. Others begin them as they are asked.
    fn in_turn(&self) -> Vec<usize> {
        match self {
            // Those come first that save most.
            Self::Optimize(job) => (0..job.bins.len()).collect(),
            Self::Ingest(_) | Self::Merge(_) | Self::Search(_) => {
                (0..self.pieces()).rev().collect()
            }
        }
    }

    /// Bins that nobody began are left; of the other steps all pieces are needed.
    fn needs_all(&self) -> bool {
        !matches!(self, Self::Optimize(_))
    }

    /// A product is one of this step.
    fn made(&self, product: &Product) -> bool {
        match self {
            Self::Ingest(_) => product.of_ingest.is_some(),
            Self::Merge(_) => product.of_merge.is_some(),
            Self::Search(_) => product.of_search.is_some(),
            Self::Optimize(_) => true,
        }
    }
}

/// How many pieces so many bytes are; one, where nobody else could do any.
pub(crate) fn pieces_of(bytes: u64, pipeline: &Pipeline, permit: &Permit) -> usize {
    if permit.team.is_none() {
        return 1;
    }
    let pieces = bytes.div_ceil(pipeline.sizes.shard_bytes.max(1));
    usize::try_from(pieces).unwrap_or(PIECES_MAX).clamp(1, PIECES_MAX)
}

/// A step's pieces, while they are being done.
pub(crate) struct Shared<'a> {
    workshop: &'a Workshop,
    task: &'a Task,
    job: Job,
    board: Board,
    permit: &'a Permit,
    team: &'a Team,
}

impl<'a> Shared<'a> {
    /// Lays the work out for others, and asks them for all of it but what is begun here.
    pub(crate) async fn begin(
        workshop: &'a Workshop,
        task: &'a Task,
        job: Job,
        permit: &'a Permit,
    ) -> Result<Self> {
        let shared = Self::lay_out(workshop, task, job, permit).await?;
        shared.ask_all().await;
        Ok(shared)
    }

    /// Lays the work out; others are to be asked.
    async fn lay_out(
        workshop: &'a Workshop,
        task: &'a Task,
        job: Job,
        permit: &'a Permit,
    ) -> Result<Self> {
        let team = permit.team.as_ref().ok_or_else(|| Error::internal("nobody to share with"))?;
        let board = Board::new(task)?;
        let holder = team.leases.holder(task.id).await.unwrap_or_default();
        if holder.as_ref() == Some(&team.owner) {
            // Of a worker that had this task before. Unless we know that we have it, it may live.
            board.clear_others().await?;
        }
        board.pin(&job).await?;
        let shared = Self { workshop, task, job, board, permit, team };
        match crash::point("shard.after_plan") {
            Ok(()) => Ok(shared),
            Err(error) => {
                shared.end().await;
                Err(error)
            }
        }
    }

    /// Lays out the next note.
    async fn note(&mut self, note: &impl Serialize) -> Result<()> {
        self.board.note(note).await
    }

    /// Asks others for all pieces but the one that is begun here.
    async fn ask_all(&self) {
        let begun_here = self.job.in_turn().first().copied();
        for number in (0..self.job.pieces()).filter(|number| Some(*number) != begun_here) {
            if !self.ask(number).await {
                break;
            }
        }
    }

    /// Asks others for a piece. False: nobody can be asked; it is done here.
    async fn ask(&self, number: usize) -> bool {
        let trace = trace::traceparent(&trace::context_of(&tracing::Span::current()));
        let asked = async {
            let task = self.task_of(number)?;
            let message = Message { id: task.id.to_string(), body: encode(&task)?, trace };
            self.team.queue.publish(Lane::Shard, message).await
        };
        let asked = asked.await;
        if let Err(error) = &asked {
            tracing::warn!(%error, number, "nobody is asked to do a piece; does it here");
        }
        asked.is_ok()
    }

    fn task_of(&self, number: usize) -> Result<Task> {
        let work = Work::Shard {
            epochs: self.task.work.epochs(),
            of: self.task.id,
            lead: self.team.owner.clone(),
            plan: self.board.plan().to_owned(),
            number: u32::try_from(number).map_err(Error::internal)?,
        };
        Ok(Task {
            format: FORMAT_MAJOR,
            id: Task::id_of(&self.task.pipeline.id, &work, 0),
            pipeline: self.task.pipeline.clone(),
            work,
            attempt: self.task.attempt,
            published_at: self.workshop.clock.now(),
        })
    }

    /// All pieces, by number; `None` where not all are needed and nobody began one.
    pub(crate) async fn gather(&self) -> Result<Vec<Option<Product>>> {
        let pieces = self.job.pieces();
        let mut products: Vec<Option<Product>> = vec![None; pieces];
        let mut pause = PAUSES[0];
        // Those that are waited for once one is done, where not all are.
        let mut awaited: Option<Vec<usize>> = None;
        // Those that another worker could not do: it may be the worker. They are done here.
        let mut failed = HashSet::new();
        loop {
            self.permit.check()?;
            for number in self.board.told().await? {
                let Some(product @ None) = products.get_mut(number) else { continue };
                if failed.contains(&number) {
                    continue;
                }
                let why = match self.board.outcome(number).await {
                    Ok(None) => continue,
                    Ok(Some(Outcome::Done(made))) if self.job.made(&made) => {
                        *product = Some(*made);
                        pause = PAUSES[0];
                        continue;
                    }
                    Ok(Some(Outcome::Deadly(deaths))) => return Err(deadly(deaths, number)),
                    Ok(Some(Outcome::Failed(error))) => error,
                    // Of another version.
                    Ok(Some(Outcome::Done(_))) => Error::internal("what another step makes"),
                    Err(error) if error.code == Code::MessageUnknown => error,
                    Err(error) => return Err(error),
                };
                tracing::warn!(error = %why, number, "another worker could not do a piece; does it here");
                failed.insert(number);
            }
            let is_open = |at: &usize| products[*at].is_none();
            let mut open: Vec<usize> = self.job.in_turn().into_iter().filter(is_open).collect();
            if !self.job.needs_all() && open.len() < pieces {
                if awaited.is_none() {
                    // Who claims one from now on sees it.
                    self.board.close().await?;
                    awaited = Some(self.taken(&open).await?);
                }
                open.retain(|number| awaited.iter().flatten().any(|awaited| awaited == number));
            }
            if open.is_empty() {
                return Ok(products);
            }
            let mut made = None;
            for number in open {
                let is_known = failed.contains(&number);
                made = self.do_one(number, is_known).await?.map(|product| (number, product));
                if made.is_some() {
                    break;
                }
            }
            if let Some((number, product)) = made {
                products[number] = Some(product);
                continue;
            }
            let of = Amount { files: pieces as u64, ..Amount::default() };
            let done = products.iter().flatten().count() as u64;
            self.permit.begin("waits for pieces that other workers do", of);
            self.permit.done(Amount { files: done, ..Amount::default() })?;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES[1]);
        }
    }

    /// Those of the pieces that another worker has.
    async fn taken(&self, pieces: &[usize]) -> Result<Vec<usize>> {
        let mut taken = Vec::new();
        for number in pieces {
            // Without leases nobody knows: what comes late is not waited for.
            let holder = self.team.leases.holder(self.task_of(*number)?.id).await;
            if holder.is_ok_and(|holder| holder.is_some()) {
                taken.push(*number);
            }
        }
        Ok(taken)
    }

    /// Does a piece; `None`: another worker has it, or has told how it ended, unless that `is_known`.
    async fn do_one(&self, number: usize, is_known: bool) -> Result<Option<Product>> {
        let team = self.team;
        let id = self.task_of(number)?.id;
        let fence = match team.leases.claim(id, &team.owner, LEASE_TTL, false).await {
            Ok(Claim::Taken { .. }) => return Ok(None),
            Ok(Claim::Held { deaths, .. }) if deaths >= CRASHES_MAX => {
                return Err(deadly(deaths, number));
            }
            Ok(Claim::Held { fence, .. }) => Some(fence),
            Err(_) => None,
        };
        let (leases, owner) = (Arc::clone(&team.leases), team.owner.clone());
        let held = Held::new(&leases, id, owner, fence);
        let permit =
            Permit { lease_lost: self.permit.lease_lost.child_token(), ..self.permit.clone() };
        let kept = held.keep(permit.lease_lost.clone(), &team.keeping);
        let made = self.try_one((number, is_known), &permit).await;
        drop(kept);
        held.release().await;
        match made {
            // Only the piece's: who has it now does it.
            Err(error)
                if error.code == Code::LeaseLost
                    && permit.lease_lost.is_cancelled()
                    && !self.permit.lease_lost.is_cancelled() =>
            {
                Ok(None)
            }
            made => made,
        }
    }

    async fn try_one(
        &self,
        (number, is_known): (usize, bool),
        permit: &Permit,
    ) -> Result<Option<Product>> {
        let (board, pipeline) = (&self.board, &self.task.pipeline);
        let tables = &self.workshop.tables;
        if !is_known && board.has(number).await? {
            return Ok(None);
        }
        let mut tries = 1;
        let made = loop {
            match self.job.carry_out((tables, board), pipeline, number, permit).await {
                // The other pieces stay done.
                Err(error)
                    if error.class() == Class::Transient
                        && error.code != Code::LeaseLost
                        && tries < TRIES =>
                {
                    tracing::info!(%error, number, "tries a piece again");
                    tries += 1;
                    tokio::time::sleep(PAUSES[1]).await;
                }
                made => break made?,
            }
        };
        // For whoever gets its message.
        if let Err(error) = board.tell(number, &Outcome::Done(Box::new(made.clone()))).await {
            tracing::warn!(%error, number, "what a piece made is known here only");
        }
        Ok(Some(made))
    }

    /// What lies beside the plan.
    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    /// Takes the plan away: what comes now finds nothing to do.
    pub(crate) async fn end(self) {
        if let Err(error) = self.board.clear().await {
            tracing::debug!(%error, "the plan of a step's pieces stays until a cleanup");
        }
    }
}

/// Does a piece that another worker asks for.
pub(crate) async fn help(
    workshop: &Workshop,
    task: &Task,
    (of, lead): (Uuid, &str),
    (plan, number): (&str, u32),
    permit: &Permit,
) -> Result<Report> {
    let board = Board::at(&task.pipeline, plan)?;
    let number = usize::try_from(number).map_err(Error::internal)?;
    let already = Report { already: true, ..Report::default() };
    let Some(job) = board.job().await? else { return Ok(already) };
    if let Some(team) = &permit.team {
        match team.leases.holder(of).await {
            // With a plan of its own.
            Ok(Some(holder)) if holder != lead => return Ok(already),
            // It died, or its lease was forgotten and it claims it anew.
            Ok(None)
                if (workshop.clock.now() - task.published_at)
                    .to_std()
                    .is_ok_and(|age| age < LEASE_TTL * 2) =>
            {
                return Err(Error::new(Code::LeaseLost, "nobody has the step at the moment"));
            }
            Ok(None) => return Ok(already),
            Ok(Some(_)) | Err(_) => {}
        }
    }
    if number >= job.pieces() || board.has(number).await? {
        return Ok(already);
    }
    if !job.needs_all() && board.is_closed().await? {
        return Ok(already);
    }
    let made = job.carry_out((&workshop.tables, &board), &task.pipeline, number, permit).await?;
    crash::point("shard.before_result")?;
    let rows_written = made.rows;
    board.tell(number, &Outcome::Done(Box::new(made))).await?;
    crash::point("shard.after_result")?;
    board.clear_if_over().await?;
    Ok(Report { rows_written, ..Report::default() })
}

/// Why a step is not tried again whose pieces kill.
fn deadly(deaths: u32, number: usize) -> Error {
    Error::new(Code::TaskPoison, format!("{deaths} workers died at piece {number} of this task"))
}

/// Tells who waits for a piece that it cannot be done here, or that workers died at it.
pub(crate) async fn give_up(task: &Task, error: &Error, deaths: u32) -> Result<()> {
    let Work::Shard { plan, number, .. } = &task.work else { return Ok(()) };
    let Ok(board) = Board::at(&task.pipeline, plan) else { return Ok(()) };
    // Nobody waits; or the plan is of another version, whose workers do it themselves.
    let Ok(Some(_)) = board.job().await else { return Ok(()) };
    let number = usize::try_from(*number).map_err(Error::internal)?;
    let outcome = match deaths {
        CRASHES_MAX.. => Outcome::Deadly(deaths),
        _ => Outcome::Failed(error.clone()),
    };
    board.tell(number, &outcome).await?;
    board.clear_if_over().await
}

/// Deletes plans that nobody waits for any more.
pub(crate) async fn forget_old(pipeline: &Pipeline) -> Result<u64> {
    Board::clear_old(pipeline).await
}
