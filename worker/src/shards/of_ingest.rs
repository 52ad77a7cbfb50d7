//! An ingest in pieces: each is some of the folder's files. What must be known of all of them (columns,
//! expectations, gates) is known before.

use std::sync::PoisonError;

use alluvium_protocol::manifest::Manifest;
use alluvium_protocol::pipeline::Format;
use alluvium_protocol::task::Task;
use alluvium_protocol::{Error, Pipeline, Result};
use alluvium_table::Table;
use alluvium_table::arrow::datatypes::SchemaRef;
use alluvium_table::arrow::ipc::reader::StreamReader;
use alluvium_table::arrow::ipc::writer::StreamWriter;
use alluvium_table::write::Written;
use serde::{Deserialize, Serialize};

use super::{Board, Product, Shared, pieces_of};
use crate::aside::{self, AsideRef};
use crate::incoming::Incoming;
use crate::ingest::{Own, incoming_as, write_content};
use crate::refusals::Judged;
use crate::selecting::Selection;
use crate::source::SourceFile;
use crate::tables::Tables;
use crate::{Permit, Workshop};

/// The rows of some files each.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    raw_version: i64,
    own: Own,
    /// The columns that are read, and those that `select` is over.
    columns: Columns,
    selects_from: Option<Columns>,
    /// Expectations that refuse rows, by their reasons.
    refuses: Vec<String>,
    /// The manifest with some of its objects.
    pub(crate) parts: Vec<Manifest>,
}

/// What a piece found beside its files.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Findings {
    rows_filtered: u64,
    /// Where the rows are that it refused.
    refused: Option<String>,
}

/// A schema, as Arrow's IPC writes it.
#[derive(Clone, Serialize, Deserialize)]
struct Columns(Vec<u8>);

impl Columns {
    fn of(schema: &SchemaRef) -> Result<Self> {
        let writer = StreamWriter::try_new(Vec::new(), schema).map_err(Error::internal)?;
        writer.into_inner().map(Self).map_err(Error::internal)
    }

    fn schema(&self) -> Result<SchemaRef> {
        let reader = StreamReader::try_new(self.0.as_slice(), None).map_err(Error::internal)?;
        Ok(reader.schema())
    }
}

/// What an ingest would be split by.
pub(crate) struct Split<'a> {
    pub(crate) manifest: &'a Manifest,
    /// Files that cannot be read, and are set aside as a whole.
    pub(crate) corrupt: &'a [(String, Error)],
}

impl Split<'_> {
    /// The pieces; `None`: it is too small for them, nobody else is there, or it takes the
    /// whole folder to judge a row.
    pub(crate) fn into_job(
        self,
        pipeline: &Pipeline,
        raw: &Table,
        (incoming, judged): (&Incoming, &Judged),
        own: &Own,
        permit: &Permit,
    ) -> Result<Option<Job>> {
        let is_whole = pipeline.content.format == Format::Delta || !incoming.has_content();
        let Some(refuses) = judged.refuses().filter(|_| !is_whole) else { return Ok(None) };
        let parts = self.parts(pipeline, permit);
        if parts.len() < 2 {
            return Ok(None);
        }
        Ok(Some(Job {
            raw_version: raw.version(),
            own: *own,
            columns: Columns::of(incoming.columns())?,
            selects_from: incoming.selects_from().map(Columns::of).transpose()?,
            refuses,
            parts,
        }))
    }

    /// Files that follow one another, about as many bytes in each part.
    fn parts(&self, pipeline: &Pipeline, permit: &Permit) -> Vec<Manifest> {
        let is_corrupt = |name: &str| self.corrupt.iter().any(|(corrupt, _)| corrupt == name);
        let mut objects = self.manifest.objects.clone();
        objects.retain(|object| !is_corrupt(&object.name));
        let bytes: u64 = objects.iter().map(|object| object.size).sum();
        let pieces = pieces_of(bytes, pipeline, permit).min(objects.len());
        let of_each = bytes.div_ceil(pieces.max(1) as u64).max(1);
        let mut parts: Vec<Manifest> = Vec::with_capacity(pieces);
        let (mut before, mut last_part) = (0, None);
        for object in objects {
            // The part where the middle of the file is.
            let part = Some((before + object.size / 2) / of_each);
            before += object.size;
            if part != last_part {
                last_part = part;
                let empty = Manifest { objects: Vec::new(), ..self.manifest.clone() };
                parts.push(empty);
            }
            if let Some(last) = parts.last_mut() {
                last.objects.push(object);
            }
        }
        for part in &mut parts {
            part.repairs.retain(|file, _| part.objects.iter().any(|object| object.name == *file));
        }
        parts
    }
}

/// Has the pieces done. Their files and rows, and what was refused.
pub(crate) async fn in_pieces(
    workshop: &Workshop,
    task: &Task,
    job: Job,
    permit: &Permit,
) -> Result<(Written, AsideRef)> {
    let shared = Shared::begin(workshop, task, super::Job::Ingest(job), permit).await?;
    let gathered = gathered(&shared).await;
    shared.end().await;
    gathered
}

async fn gathered(shared: &Shared<'_>) -> Result<(Written, AsideRef)> {
    let (mut written, aside) = (Written::default(), aside::new());
    for product in shared.gather().await?.into_iter().flatten() {
        written.adds.extend(product.adds);
        written.rows += product.rows;
        let found = product.of_ingest.ok_or_else(|| Error::internal("a piece of another step"))?;
        let mut refused = {
            let mut aside = aside.lock().unwrap_or_else(PoisonError::into_inner);
            aside.filtered += found.rows_filtered;
            aside.take()
        };
        if let Some(name) = &found.refused {
            shared.board().add_kept(name, &mut refused).await?;
        }
        aside.lock().unwrap_or_else(PoisonError::into_inner).put_back(refused);
    }
    Ok((written, aside))
}

impl Job {
    pub(super) async fn carry_out(
        &self,
        (tables, board): (&Tables, &Board),
        pipeline: &Pipeline,
        number: usize,
        permit: &Permit,
    ) -> Result<Product> {
        let part = &self.parts[number];
        let raw = tables.at(&pipeline.raw, self.raw_version).await?;
        let opened = SourceFile::open_all(pipeline, part).await?;
        if let Some((_, error)) = opened.corrupt.into_iter().next() {
            // It could be read a moment ago.
            return Err(error);
        }
        let selection = match (&pipeline.content.select, &self.selects_from) {
            (Some(select), Some(columns)) => {
                Some(Selection::compile(pipeline, select, &columns.schema()?).await?)
            }
            _ => None,
        };
        let read_as = (self.columns.schema()?, selection);
        let incoming = incoming_as(pipeline, part, opened.files, read_as, permit);
        let judged = Judged::of_some(pipeline, &incoming, &self.refuses).await?;
        let (written, aside) =
            write_content(pipeline, &raw, (&incoming, &judged), &self.own, permit).await?;
        let (refused, rows_filtered) = {
            let mut aside = aside.lock().unwrap_or_else(PoisonError::into_inner);
            (aside.take(), aside.filtered)
        };
        let refused = board.keep(refused).await?;
        let of_ingest = Some(Findings { rows_filtered, refused });
        Ok(Product { of_ingest, ..Product::of(written) })
    }
}
