//! Texts and binaries of a column chunk, straight from its pages: no array is built, no byte is copied.
//!
//! For the encodings that nearly all writers use for keys (plain, dictionary); others, and whatever does
//! not add up, are left to arrow's reader, which also words the error.
//!
//! Format: <https://parquet.apache.org/docs/file-format/data-pages/encodings/>

use std::sync::Arc;

use bytes::Bytes;
use deltalake::parquet::basic::{Encoding, Type};
use deltalake::parquet::column::page::{Page, PageReader};
use deltalake::parquet::file::metadata::ColumnChunkMetaData;
use deltalake::parquet::file::reader::ChunkReader;
use deltalake::parquet::file::serialized_reader::SerializedPageReader;

/// More values of a page are not held in memory at a time: a few bytes can claim billions.
const PAGE_VALUES_MAX: usize = 1 << 20;

/// A chunk that [`each_value`] may be able to read.
pub(super) fn is_readable(column: &ColumnChunkMetaData) -> bool {
    let known =
        |encoding| matches!(encoding, Encoding::PLAIN | Encoding::RLE) || is_dictionary(encoding);
    let descriptor = column.column_descr();
    column.column_type() == Type::BYTE_ARRAY
        && descriptor.max_rep_level() == 0
        && descriptor.max_def_level() <= 1
        && column.encodings().all(known)
}

fn is_dictionary(encoding: Encoding) -> bool {
    matches!(encoding, Encoding::RLE_DICTIONARY | Encoding::PLAIN_DICTIONARY)
}

/// Values of one page: each with its row in the chunk; NULL is left out.
pub(super) type Values<'a> = Vec<(u64, &'a [u8])>;

/// Gives the values of a chunk of `rows` rows to `visit`, page by page. `None`: arrow's reader is to read it.
pub(super) fn each_value<R: ChunkReader + 'static>(
    bytes: &Arc<R>,
    column: &ColumnChunkMetaData,
    rows: u64,
    mut visit: impl FnMut(&Values<'_>),
) -> Option<()> {
    let total = usize::try_from(rows).ok()?;
    let mut pages = SerializedPageReader::new(Arc::clone(bytes), column, total, None).ok()?;
    let has_nulls = column.column_descr().max_def_level() == 1;
    let mut dictionary: Option<(Bytes, Vec<(usize, usize)>)> = None;
    let mut first_row = 0;
    while let Some(page) = pages.get_next_page().ok()? {
        let (buffer, values, encoding, levels) = match page {
            Page::DictionaryPage { buf, num_values, .. } => {
                if u64::from(num_values) > rows {
                    return None;
                }
                let places = plain_places(&buf, num_values as usize)?;
                dictionary = Some((buf, places));
                continue;
            }
            Page::DataPage { buf, num_values, encoding, def_level_encoding, .. } => {
                let mut levels = 0..0;
                if has_nulls {
                    if def_level_encoding != Encoding::RLE {
                        return None;
                    }
                    levels = 4..4 + length_at(&buf, 0)?;
                }
                (buf, num_values as usize, encoding, levels)
            }
            Page::DataPageV2 {
                buf,
                num_values,
                encoding,
                def_levels_byte_len,
                rep_levels_byte_len,
                ..
            } => {
                let from = rep_levels_byte_len as usize;
                let levels = from..from + def_levels_byte_len as usize;
                (buf, num_values as usize, encoding, levels)
            }
        };
        if values as u64 > rows - first_row || values > PAGE_VALUES_MAX {
            return None;
        }
        let places: Vec<u64> = match has_nulls {
            true => {
                let defined = hybrid(buffer.get(levels.clone())?, 1, values)?;
                let defined = defined.iter().enumerate().filter(|(_, level)| **level == 1);
                defined.map(|(row, _)| first_row + row as u64).collect()
            }
            false => (first_row..first_row + values as u64).collect(),
        };
        let body = buffer.get(levels.end..)?;
        if encoding == Encoding::PLAIN {
            let held = plain_places(body, places.len())?;
            let held = held.iter().map(|(from, to)| &body[*from..*to]);
            visit(&places.into_iter().zip(held).collect());
        } else if is_dictionary(encoding) {
            let (bytes, words) = dictionary.as_ref()?;
            let width = *body.first()?;
            let mut found = Vec::with_capacity(places.len());
            for (row, word) in places.iter().zip(hybrid(&body[1..], width, places.len())?) {
                let (from, to) = *words.get(word as usize)?;
                found.push((*row, &bytes[from..to]));
            }
            visit(&found);
        } else {
            return None;
        }
        first_row += values as u64;
    }
    (first_row == rows).then_some(())
}

fn length_at(bytes: &[u8], at: usize) -> Option<usize> {
    let length: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(length)).ok()
}

/// Where plain values lie: each has its length before it.
fn plain_places(bytes: &[u8], values: usize) -> Option<Vec<(usize, usize)>> {
    let mut places = Vec::with_capacity(values.min(bytes.len()));
    let mut at: usize = 0;
    for _ in 0..values {
        let from = at + 4;
        let to = from.checked_add(length_at(bytes, at)?)?;
        if to > bytes.len() {
            return None;
        }
        places.push((from, to));
        at = to;
    }
    Some(places)
}

/// Numbers of `width` bits in runs of equal ones and in packs of eight.
fn hybrid(bytes: &[u8], width: u8, count: usize) -> Option<Vec<u32>> {
    if width > 32 {
        return None;
    }
    let (width, mut at) = (usize::from(width), 0);
    let mut numbers = Vec::with_capacity(count);
    while numbers.len() < count {
        let mut header: u64 = 0;
        for shift in (0..35).step_by(7) {
            let byte = *bytes.get(at)?;
            at += 1;
            header |= u64::from(byte & 127) << shift;
            if byte < 128 {
                break;
            }
        }
        let left = count - numbers.len();
        let length = usize::try_from(header >> 1).ok()?;
        if header & 1 == 0 {
            let of_run = bytes.get(at..at + width.div_ceil(8))?;
            at += of_run.len();
            let number = of_run.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte));
            numbers.extend(std::iter::repeat_n(number, length.min(left)));
        } else {
            // The last pack may be cut off behind its last number.
            let packed = bytes.get(at..)?;
            let packed = &packed[..packed.len().min(length.checked_mul(width)?)];
            at += packed.len();
            unpack(packed, width, left.min(length.checked_mul(8)?), &mut numbers)?;
        }
        if length == 0 {
            return None;
        }
    }
    Some(numbers)
}

/// Numbers of `width` bits, the lowest bits first.
fn unpack(packed: &[u8], width: usize, count: usize, numbers: &mut Vec<u32>) -> Option<()> {
    let mask = (1_u64 << width) - 1;
    let (mut bits, mut held, mut at) = (0_u64, 0, 0);
    for _ in 0..count {
        while held < width {
            bits |= u64::from(*packed.get(at)?) << held;
            at += 1;
            held += 8;
        }
        numbers.push((bits & mask) as u32);
        bits >>= width;
        held -= width;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_packs_are_numbers() {
        // The example of the format's text: 0 to 7 in three bits each.
        assert_eq!(hybrid(&[0b11, 0x88, 0xC6, 0xFA], 3, 8).unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
        // Five times 300 in ten bits, then a pack that is cut off.
        assert_eq!(hybrid(&[10, 0x2C, 0x01], 10, 5).unwrap(), [300; 5]);
        assert_eq!(hybrid(&[0b11, 0b101], 1, 3).unwrap(), [1, 0, 1]);
        assert_eq!(hybrid(&[8], 0, 4).unwrap(), [0; 4]);
    }

    #[test]
    fn what_does_not_add_up_is_left_alone() {
        for (bytes, width) in [(&[] as &[u8], 1), (&[0, 1], 1), (&[10], 10), (&[0b11, 1], 33)] {
            assert_eq!(hybrid(bytes, width, 5), None);
        }
        assert_eq!(plain_places(&[3, 0, 0, 0, b'a', b'b'], 1), None);
        assert_eq!(plain_places(&[255, 255, 255, 255], 1), None);
        assert_eq!(plain_places(&[1, 0, 0, 0, b'a', 0, 0, 0, 0], 2), Some(vec![(4, 5), (9, 9)]));
    }
}
