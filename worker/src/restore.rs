//! Restore: main goes back to an earlier point, in one commit that also holds the pipeline.
//!
//! ```text
//!  which epochs stay applied, which go?
//!    ├─ a version of main holds just that, its files are there ─► its files again
//!    └─ else, by epoch only ─► each key of the epochs that go, by the rule over those that stay
//!  one commit: files, wanted(e) above every generation of the epochs that go, hold, the request
//! ```
//! After it main is the fold of what is applied, as always; the epochs that went merge again when
//! somebody resumes. A version that holds what raw no longer says (an epoch was read anew since) does not
//! come back: no later merge could tell its rows from others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use alluvium_protocol::manifest::Manifest;
use alluvium_protocol::marker::{
    EpochMarker, Generation, Markers, epoch_app_id, hold_app_id, request_app_id,
};
use alluvium_protocol::task::{Report, RestoreTo, Task};
use alluvium_protocol::{Code, Epoch, Error, Pipeline, Result, crash};
use alluvium_table::arrow::datatypes::Field;
use alluvium_table::classify::foreign;
use alluvium_table::commit::{Change, CommitOutcome, Marker, Operation};
use alluvium_table::deletion::version_of;
use alluvium_table::history::CommitRecord;
use alluvium_table::pause::Pauses;
use alluvium_table::store::object_store_at;
use alluvium_table::{Action, Add, LiveFile, Remove, Table, bytes_of};
use chrono::Utc;
use futures::TryStreamExt;
use object_store::ObjectStore;

use crate::folding::Fold;
use crate::ingest::COMMIT_PATIENCE;
use crate::merge::{check_age, count_files};
use crate::points::kept_versions;
use crate::tables::is_ours;
use crate::widening::{narrower, rewritten};
use crate::{Permit, Workshop, feed, raw};

/// What a restore will do, on exactly these snapshots.
pub struct RestorePlan {
    /// The version whose files come back; `None`: the rows are computed from raw.
    pub version: Option<i64>,
    /// Epochs that go out of main, and merge again after `resume`.
    pub out: Vec<Epoch>,
    /// Epochs that come back into main with the version's files.
    pub back: Vec<Epoch>,
    /// Files that come back.
    pub adds: Vec<Add>,
    /// Files that go.
    pub removes: Vec<LiveFile>,
    wanted: Vec<(Epoch, Generation)>,
    merged: Vec<(Epoch, Generation)>,
    kept: BTreeSet<Epoch>,
    markers: Markers,
}

/// Carries out a restore task.
pub async fn restore(
    workshop: &Workshop,
    task: &Task,
    to: RestoreTo,
    request: &str,
    permit: &Permit,
) -> Result<Report> {
    let pipeline = &task.pipeline;
    let mut pauses = Pauses::for_at_most(COMMIT_PATIENCE);
    let mut conflicts = 0;
    let _turn = workshop.tables.turn(&pipeline.main).await;
    let done = request_app_id(&pipeline.id, request);
    loop {
        permit.check()?;
        let started = Instant::now();
        let mut main = open(workshop, &pipeline.main).await?;
        main.check_settings(pipeline)?;
        if main.transaction(&done).is_some() {
            let main_version = Some(main.version());
            return Ok(Report { already: true, conflicts, main_version, ..Report::default() });
        }
        let raw = open(workshop, &pipeline.raw).await?;
        let plan = RestorePlan::make(&main, &raw, pipeline, to).await?;
        crash::point("restore.after_plan")?;
        let (change, report) = plan.change(task, &main, &raw, request, permit).await?;
        check_age(started, pipeline)?;
        permit.check()?;
        crash::point("restore.before_commit")?;
        match main.commit(change).await? {
            CommitOutcome::Landed => {}
            CommitOutcome::Lost(error) => {
                conflicts += 1;
                if !pauses.wait().await {
                    return Err(error);
                }
                continue;
            }
        }
        crash::point("restore.after_commit")?;
        workshop.tables.remember(&main);
        if let Err(error) = main.checkpoint_if_due().await {
            tracing::warn!(%error, "no checkpoint; the next one makes up for it");
        }
        let files = count_files(&main, pipeline).await?;
        let main_version = Some(main.version());
        return Ok(Report { main_version, conflicts, main: files, ..report });
    }
}

async fn open(workshop: &Workshop, uri: &str) -> Result<Table> {
    workshop.tables.open(uri).await?.ok_or_else(|| {
        Error::new(
            Code::NotPossibleNow,
            format!("there is no table at {uri}: nothing to roll back"),
        )
    })
}

impl RestorePlan {
    /// Decides how main gets back to `to`, without changing anything.
    pub async fn make(
        main: &Table,
        raw: &Table,
        pipeline: &Pipeline,
        to: RestoreTo,
    ) -> Result<Self> {
        let markers = Markers::joined(
            Markers::of_pipeline(&pipeline.id, raw.transactions()),
            Markers::of_pipeline(&pipeline.id, main.transactions()),
        );
        // Content that is pinned and not in raw has a generation that no marker shows so far.
        let pinned = pinned_generations(pipeline).await?;
        match to {
            RestoreTo::Version(version) => {
                let at = markers_at(main, pipeline, version).await?;
                refuse_other_content(pipeline, &at, &markers, version)?;
                let files = files_to_bring_back(main, pipeline, version).await?;
                let plan = Self::by_version(markers, &at, &pinned, version, files);
                plan.refuse_pending(pipeline, &pinned, version)?;
                if plan.is_nothing() {
                    let text = format!("{} holds what it held at version {version}", main.uri());
                    return Err(Error::new(Code::NotPossibleNow, text).with_help(format!(
                        "`alluvium tables history {}` lists versions",
                        pipeline.id
                    )));
                }
                Ok(plan)
            }
            RestoreTo::Epoch(epoch) => {
                Self::to_epoch(main, pipeline, markers, &pinned, epoch).await
            }
        }
    }

    async fn to_epoch(
        main: &Table,
        pipeline: &Pipeline,
        markers: Markers,
        pinned: &BTreeMap<Epoch, Generation>,
        epoch: Epoch,
    ) -> Result<Self> {
        let (kept, out): (BTreeSet<Epoch>, BTreeSet<Epoch>) =
            markers.applied().into_iter().partition(|applied| *applied <= epoch);
        if out.is_empty() {
            let text = format!("no epoch above {epoch} is in main: there is nothing to roll back");
            return Err(Error::new(Code::NotPossibleNow, text)
                .with_help(format!("`alluvium epochs {}` lists what is", pipeline.id)));
        }
        if markers.is_settled(epoch) && markers.floor != Some(epoch) {
            let text = format!("epoch {epoch} lies below the floor, which is in main for good");
            return Err(Error::new(Code::EpochSettled, text));
        }
        for (version, at) in versions_with(main, pipeline, &markers, &kept, &out).await? {
            match files_to_bring_back(main, pipeline, version).await {
                Ok(files) => return Ok(Self::by_version(markers, &at, pinned, version, files)),
                Err(error) => tracing::info!(%error, "computes the rows from raw"),
            }
        }
        let whole: BTreeSet<Epoch> = kept.union(&out).copied().collect();
        let lost: Vec<Epoch> = whole.into_iter().filter(|e| markers.is_lost(*e)).collect();
        if !lost.is_empty() {
            let error = raw::lost(pipeline, &lost);
            return Err(Error { code: Code::RestoreImpossible, ..error });
        }
        let wanted = out.iter().map(|e| (*e, next_generation(&markers, pinned, *e))).collect();
        Ok(Self {
            version: None,
            out: out.into_iter().collect(),
            back: Vec::new(),
            adds: Vec::new(),
            removes: Vec::new(),
            wanted,
            merged: Vec::new(),
            kept,
            markers,
        })
    }

    /// An epoch that comes back as it was must not have other content on its way: that would be taken
    /// for what is there.
    fn refuse_pending(
        &self,
        pipeline: &Pipeline,
        pinned: &BTreeMap<Epoch, Generation>,
        version: i64,
    ) -> Result<()> {
        let held = |epoch: &Epoch| self.markers.ingest.get(epoch).copied().unwrap_or(0);
        let is_pending = |epoch: &&Epoch| pinned.get(epoch).is_some_and(|p| *p > held(epoch));
        let Some(epoch) = self.back.iter().find(is_pending) else { return Ok(()) };
        let text =
            format!("version {version}: other content of epoch {epoch} waits for its ingest");
        Err(Error::new(Code::RestoreImpossible, text)
            .with_help(format!("first `alluvium resume {}`, and let it be processed", pipeline.id)))
    }

    fn is_nothing(&self) -> bool {
        let files = self.adds.len() + self.removes.len();
        files + self.out.len() + self.back.len() == 0
    }

    fn by_version(
        markers: Markers,
        at: &Markers,
        pinned: &BTreeMap<Epoch, Generation>,
        version: i64,
        files: (Vec<Add>, Vec<LiveFile>),
    ) -> Self {
        let (mut wanted, mut merged) = (Vec::new(), Vec::new());
        let (mut out, mut back, mut kept) = (Vec::new(), Vec::new(), BTreeSet::new());
        let known: BTreeSet<Epoch> = markers.merge.keys().chain(at.merge.keys()).copied().collect();
        for epoch in known {
            let (is_applied, was_applied) = (markers.is_applied(epoch), at.is_applied(epoch));
            if was_applied && has_content(at, &markers, epoch) {
                kept.insert(epoch);
                if !is_applied {
                    merged.push((epoch, markers.merge_target(epoch)));
                    back.push(epoch);
                }
                continue;
            }
            if is_applied {
                wanted.push((epoch, next_generation(&markers, pinned, epoch)));
                out.push(epoch);
            }
        }
        let (adds, removes) = files;
        Self { version: Some(version), out, back, adds, removes, wanted, merged, kept, markers }
    }

    /// The commit, with files that were written for it where rows are computed.
    async fn change(
        &self,
        task: &Task,
        main: &Table,
        raw: &Table,
        request: &str,
        permit: &Permit,
    ) -> Result<(Change, Report)> {
        let pipeline = &task.pipeline;
        let (adds, removes, others, report) = match self.version {
            Some(_) => self.files(pipeline, main, permit).await?,
            None => self.computed(pipeline, main, raw, permit).await?,
        };
        let marker = |(epoch, generation): &(Epoch, Generation), kind| Marker {
            app_id: epoch_app_id(&pipeline.id, *epoch, kind),
            version: *generation,
        };
        let mut markers: Vec<Marker> = Vec::new();
        markers.extend(self.wanted.iter().map(|pair| marker(pair, EpochMarker::Wanted)));
        markers.extend(self.merged.iter().map(|pair| marker(pair, EpochMarker::Merge)));
        if !self.markers.is_held() {
            let version = self.markers.hold + 1;
            markers.push(Marker { app_id: hold_app_id(&pipeline.id), version });
        }
        markers.push(Marker { app_id: request_app_id(&pipeline.id, request), version: 1 });
        let operation = match self.version.and_then(|version| u64::try_from(version).ok()) {
            Some(version) => Operation::Restore { version },
            None => Operation::Merge,
        };
        let change = Change {
            operation,
            adds,
            removes,
            others,
            markers,
            info: serde_json::json!({
                "pipeline": pipeline.id, "step": "restore", "task": task.id, "request": request,
                "version": self.version, "taken_out": self.out, "brought_back": self.back,
                "configuration": pipeline.hash(),
            }),
        };
        let taken_out = self.out.clone();
        Ok((change, Report { taken_out, raw_version: Some(raw.version()), ..report }))
    }

    async fn files(
        &self,
        pipeline: &Pipeline,
        main: &Table,
        permit: &Permit,
    ) -> Result<(Vec<Add>, Vec<Remove>, Vec<Action>, Report)> {
        let mut feed = Vec::new();
        let adds = self.as_now_typed(main, permit).await?;
        if main.tells_changes() {
            let coming: Vec<LiveFile> = adds.iter().map(LiveFile::of).collect();
            feed = feed::of_files(main, pipeline, (&self.removes, &coming), permit).await?;
        }
        let report = Report {
            files_added: adds.len() as u64,
            files_removed: self.removes.len() as u64,
            bytes_written: bytes_of(&adds),
            ..Report::default()
        };
        let removes = self.removes.iter().map(|file| file.remove.clone()).collect();
        Ok((adds, removes, feed, report))
    }

    /// The version's files; where columns got wider types since, written anew: readers take what a file
    /// and its folder say for the types of the table as it is now.
    async fn as_now_typed(&self, main: &Table, permit: &Permit) -> Result<Vec<Add>> {
        let version = self.version.and_then(|version| u64::try_from(version).ok());
        let then = Table::open_at(main.uri(), version).await?;
        let then = then.ok_or_else(|| Error::internal("the version is gone"))?;
        let schema = main.schema();
        let columns: Vec<Field> = schema.fields().iter().map(|field| (**field).clone()).collect();
        if narrower(&then.schema(), &columns).is_empty() {
            return Ok(self.adds.clone());
        }
        let mut adds = Vec::new();
        for add in &self.adds {
            permit.check()?;
            adds.extend(rewritten(&then, &LiveFile::of(add), &schema).await?.adds);
        }
        Ok(adds)
    }

    /// Each key of the epochs that go, by the rule over the epochs that stay.
    async fn computed(
        &self,
        pipeline: &Pipeline,
        main: &Table,
        raw: &Table,
        permit: &Permit,
    ) -> Result<(Vec<Add>, Vec<Remove>, Vec<Action>, Report)> {
        let out: BTreeSet<Epoch> = self.out.iter().copied().collect();
        let (changed, applied) = (&out, &self.kept);
        let fold = Fold { pipeline, main, raw, changed, applied, is_fast: false };
        let edit = fold.edit(permit).await?;
        let report = Report {
            rows_written: edit.written.rows,
            rows_inserted: edit.upserts.saturating_sub(edit.updated),
            rows_updated: edit.updated,
            rows_deleted: edit.hits.saturating_sub(edit.updated),
            files_added: edit.written.adds.len() as u64,
            files_removed: edit.files_removed(),
            bytes_written: bytes_of(&edit.written.adds),
            reconciled: true,
            ..Report::default()
        };
        Ok((edit.adds(), edit.removes(), edit.feed, report))
    }
}

/// Above every generation of an epoch, in the markers or given out to a manifest.
fn next_generation(
    markers: &Markers,
    pinned: &BTreeMap<Epoch, Generation>,
    epoch: Epoch,
) -> Generation {
    markers.generation(epoch).max(pinned.get(&epoch).copied().unwrap_or(0)) + 1
}

/// The newest generation of each epoch that a manifest was stored for.
async fn pinned_generations(pipeline: &Pipeline) -> Result<BTreeMap<Epoch, Generation>> {
    let store = object_store_at(&pipeline.state)?;
    let folder = object_store::path::Path::from(format!("manifests/{}", pipeline.id));
    let listed: Vec<_> = store
        .list(Some(&folder))
        .try_collect()
        .await
        .map_err(|e| foreign(format!("list the manifests of {}", pipeline.id), &e))?;
    let mut newest = BTreeMap::new();
    for meta in listed {
        let named = meta.location.filename().and_then(Manifest::parse_name);
        if let Some((epoch, generation)) = named {
            let held = newest.entry(epoch).or_insert(generation);
            *held = generation.max(*held);
        }
    }
    Ok(newest)
}

/// Main as of `at` had the content of `epoch` that raw has now: generations are given out above every
/// marker, so a merge at or above raw's generation was one of that content.
fn has_content(at: &Markers, now: &Markers, epoch: Epoch) -> bool {
    let held = now.ingest.get(&epoch).copied();
    match (held, at.merge.get(&epoch)) {
        (Some(held), Some(merged)) => *merged >= held,
        // Raw lost it: what main had of it is all there is.
        (None, merged) => merged == now.merge.get(&epoch),
        (Some(_), None) => false,
    }
}

fn refuse_other_content(
    pipeline: &Pipeline,
    at: &Markers,
    now: &Markers,
    version: i64,
) -> Result<()> {
    let changed: Vec<String> = at
        .applied()
        .into_iter()
        .filter(|epoch| !has_content(at, now, *epoch))
        .map(|epoch| epoch.to_string())
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    let text = format!(
        "version {version} of {} holds an earlier content of epoch(s) {}: they were replayed, undone or \
         skipped since",
        pipeline.main,
        changed.join(", ")
    );
    Err(Error::new(Code::RestoreImpossible, text).with_help(format!(
        "`alluvium rollback {} --to-epoch E` uses their present content",
        pipeline.id
    )))
}

async fn markers_at(main: &Table, pipeline: &Pipeline, version: i64) -> Result<Markers> {
    let impossible = |why: String| {
        Error::new(Code::RestoreImpossible, format!("version {version} of {}: {why}", main.uri()))
            .with_help(format!("`alluvium tables history {}` lists versions", pipeline.id))
    };
    let newest = main.version();
    let at = u64::try_from(version).map_err(|_| impossible("there is none".to_owned()))?;
    if version > newest {
        return Err(impossible(format!("there is none; the newest is {newest}")));
    }
    let found = Table::open_at(main.uri(), Some(at)).await;
    let found =
        found.map_err(|error| impossible(format!("it cannot be read ({})", error.message)))?;
    let found = found.ok_or_else(|| impossible("there is none".to_owned()))?;
    if !is_ours(&found) {
        return Err(impossible("it was made before the pipeline began".to_owned()));
    }
    let markers = Markers::of_pipeline(&pipeline.id, found.transactions());
    let floor = Markers::of_pipeline(&pipeline.id, main.transactions()).floor;
    if markers.floor != floor {
        return Err(impossible("the floor was raised since".to_owned()));
    }
    Ok(markers)
}

/// What a restore of a version adds and removes. Err: a file is gone, or a cleanup may be about to
/// take it: files that left main more than three quarters of the retention ago are not brought back,
/// unless a rollback point keeps them.
pub(crate) async fn files_to_bring_back(
    main: &Table,
    pipeline: &Pipeline,
    version: i64,
) -> Result<(Vec<Add>, Vec<LiveFile>)> {
    let impossible = |why: String| {
        Error::new(Code::RestoreImpossible, format!("version {version} of {}: {why}", main.uri()))
            .with_help(
                "`rollback --to-epoch` computes main from raw; `rollback-point add` keeps versions",
            )
    };
    let at = u64::try_from(version).map_err(|_| impossible("there is none".to_owned()))?;
    let then = Table::open_at(main.uri(), Some(at)).await;
    let then =
        then.map_err(|error| impossible(format!("it cannot be read ({})", error.message)))?;
    let then = then.ok_or_else(|| impossible("there is none".to_owned()))?;
    let adds = then.adds().await?;
    if !adds.is_empty() && !kept_versions(main).contains(&at) && version < main.version() {
        let next = main.commit_record(version + 1).await?;
        let age = next.map(|next| Utc::now() - next.at);
        let most = chrono::Duration::from_std(pipeline.sizes.vacuum_retention * 3 / 4);
        if age.is_none_or(|age| most.is_ok_and(|most| age > most)) {
            let days = pipeline.sizes.vacuum_retention.as_secs() / 3600;
            let text = format!(
                "its files are older than three quarters of the {days} h that cleanup keeps them"
            );
            return Err(impossible(text));
        }
    }
    let live = main.files().await?;
    // A file with other rows deleted is another state of it.
    let held: HashMap<&str, _> = live
        .iter()
        .map(|file| (file.path.as_str(), version_of(file.remove.deletion_vector.as_ref())))
        .collect();
    let returning: Vec<Add> = adds
        .values()
        .filter(|add| {
            held.get(add.path.as_str()) != Some(&version_of(add.deletion_vector.as_ref()))
        })
        .cloned()
        .collect();
    let missing = main.missing_of(&returning.iter().collect::<Vec<_>>()).await?;
    if let Some(first) = missing.first() {
        return Err(impossible(format!("{} of its files are gone, {first} first", missing.len())));
    }
    let leaving = live
        .iter()
        .filter(|file| {
            let then = adds.get(&file.path).map(|add| version_of(add.deletion_vector.as_ref()));
            then != Some(version_of(file.remove.deletion_vector.as_ref()))
        })
        .cloned()
        .collect();
    Ok((returning, leaving))
}

/// Versions of main that hold exactly the epochs `kept`, with what raw says of them now, as far as they
/// are easily found. Their files may be gone.
pub(crate) async fn versions_with(
    main: &Table,
    pipeline: &Pipeline,
    markers: &Markers,
    kept: &BTreeSet<Epoch>,
    out: &BTreeSet<Epoch>,
) -> Result<Vec<(i64, Markers)>> {
    let mut found = Vec::new();
    for version in candidates(main, pipeline, out).await? {
        let Ok(at) = markers_at(main, pipeline, version).await else { continue };
        if at.applied() == *kept && kept.iter().all(|e| has_content(&at, markers, *e)) {
            found.push((version, at));
        }
    }
    Ok(found)
}

/// Versions right before the epochs' last merges, and right before their first: one of them holds
/// what is to stay, unless epochs came late or were read anew.
async fn candidates(main: &Table, pipeline: &Pipeline, out: &BTreeSet<Epoch>) -> Result<Vec<i64>> {
    let names: HashMap<String, Epoch> = out
        .iter()
        .map(|epoch| (epoch_app_id(&pipeline.id, *epoch, EpochMarker::Merge), *epoch))
        .collect();
    let records: Vec<CommitRecord> = main.history(0).await?;
    let mut last: BTreeMap<Epoch, i64> = BTreeMap::new();
    let mut first: BTreeMap<Epoch, i64> = BTreeMap::new();
    for record in &records {
        for epoch in record.markers.iter().filter_map(|(app_id, _)| names.get(app_id)) {
            last.entry(*epoch).or_insert(record.version);
            first.insert(*epoch, record.version);
        }
    }
    let before = |merges: &BTreeMap<Epoch, i64>| merges.values().min().map(|version| version - 1);
    let mut versions: Vec<i64> = before(&last).into_iter().chain(before(&first)).collect();
    versions.dedup();
    versions.retain(|version| *version >= 0);
    Ok(versions)
}
