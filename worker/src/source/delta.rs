//! A folder that is a Delta table: its live files, at the version that was pinned.

use std::sync::Arc;

use alluvium_protocol::manifest::{Manifest, Object};
use alluvium_protocol::{Code, Error, Result};
use alluvium_table::Table;
use alluvium_table::arrow::array::{ArrayRef, StringArray};
use alluvium_table::arrow::compute::{CastOptions, cast_with_options};
use alluvium_table::arrow::datatypes::Field;

/// A data file that the table's log names.
pub(super) struct LiveObject {
    pub(super) object: Object,
    /// Values of the partition columns, which the file itself does not hold.
    pub(super) values: Vec<(Field, ArrayRef)>,
}

/// The live files of the table in the manifest's folder, by name.
pub(super) async fn live_files(source: &str, manifest: &Manifest) -> Result<Vec<LiveObject>> {
    let uri = format!("{}/{}", source.trim_end_matches('/'), manifest.folder);
    let unreadable = |why: &str| {
        Error::new(Code::FileUnreadable, format!("{uri}: {why}"))
            .with_help("deliver the folder as a Delta table without that, or set another `format`")
    };
    let version = manifest.objects.iter().filter_map(|object| version_of(&object.name)).max();
    let version =
        version.ok_or_else(|| unreadable("it has no _delta_log: it is no Delta table"))?;
    let table = Table::open_at(&uri, Some(version)).await.map_err(|error| {
        // What cannot be opened is this folder's affair.
        if error.code == Code::TableUnreadable { unreadable(&error.message) } else { error }
    })?;
    let table = table.ok_or_else(|| unreadable("it is no Delta table"))?;
    let mapping = table.properties().get("delta.columnMapping.mode").cloned();
    if mapping.is_some_and(|mode| !mode.eq_ignore_ascii_case("none")) {
        return Err(unreadable("the table uses column mapping, which is not read here"));
    }
    let schema = table.schema();
    let mut found = Vec::new();
    for file in table.files().await? {
        if file.remove.deletion_vector.is_some() {
            return Err(unreadable("the table uses deletion vectors, which are not read here"));
        }
        let object = manifest.objects.iter().find(|object| object.name == file.path);
        let object = object.ok_or_else(|| {
            unreadable(&format!("its log names {}, which is not there", file.path))
        })?;
        let mut values = Vec::new();
        for name in table.partition_columns() {
            let Ok(field) = schema.field_with_name(&name) else { continue };
            if field.data_type() == &alluvium_table::arrow::datatypes::DataType::Binary {
                return Err(unreadable(&format!("partition column {name:?} is binary")));
            }
            let text = StringArray::from(vec![file.partition.get(&name).cloned().flatten()]);
            let strictly = CastOptions { safe: false, ..CastOptions::default() };
            let text = Arc::new(text) as ArrayRef;
            let value = cast_with_options(&text, field.data_type(), &strictly);
            let value =
                value.map_err(|e| unreadable(&format!("partition column {name:?}: {e}")))?;
            values.push((field.clone(), value));
        }
        found.push(LiveObject { object: object.clone(), values });
    }
    found.sort_by(|a, b| a.object.name.cmp(&b.object.name));
    Ok(found)
}

fn version_of(name: &str) -> Option<u64> {
    name.strip_prefix("_delta_log/")?.strip_suffix(".json")?.parse().ok()
}
